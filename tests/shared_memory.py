"""A cluster and streams whose payloads go through shared memory."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import expertmesh
from expertmesh.codec.messages import EXECUTE_REQUEST, EXECUTE_RESPONSE
from expertmesh.config import RouterConfig, RpcConfig, SharedMemoryConfig
from expertmesh.rpc import loop
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.lending import Lender
from expertmesh.rpc.served_frames import FrameProtocol
from expertmesh.rpc.server import stream_tensor
from expertmesh.rpc.stream import FrameStream
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.wire import wait_until_idle

AUTO = SharedMemoryConfig(mode="auto", size_bytes=64 << 20)
Sharing = expertmesh.client.AsyncMesh


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    with local_mesh(
        path, backend="reference", router_config=RouterConfig(shared_memory=AUTO)
    ) as cluster:
        cluster.model = model
        yield cluster


@pytest.fixture(autouse=True)
def every_block_comes_back(mesh: LocalMesh) -> Iterator[None]:
    yield
    wait_until_idle(mesh)
    gc.collect()  # answers that a failed test still has at hand
    wait_until(lambda: sum(each.lent_bytes for each in router_lenders(mesh)) == 0, 5.0, "returned")


@pytest.fixture
def client(mesh: LocalMesh) -> Iterator[Sharing]:
    opened = loop.run(expertmesh.connect_async(mesh.address, shared_memory=AUTO))
    share(opened)
    yield opened
    loop.run(opened.close())


def share(client: Sharing) -> Lender:
    """Opens the client's stream and waits until payloads go through shared memory."""
    (link,) = client._links.values()
    stream = loop.run(link.stream())
    wait_until(lambda: stream.transport == "shm", 5.0, "shared")
    lender = stream._lender
    assert lender is not None
    return lender


def router_lenders(mesh: LocalMesh) -> list[Lender]:
    """Of the router's streams to its servers; blocks whose views have died are free."""
    lenders = [link._stream._lender for _, link in mesh.routers[0].router.pool.links()]
    for lender in lenders:
        loop.run(_collected(lender))
    return lenders


async def _collected(lender: Lender) -> None:
    lender._collect()


@asynccontextmanager
async def _serving(method: Any) -> AsyncIterator[int]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.X", {"S": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


Act = Callable[[FrameStream], Awaitable[Any]]


async def with_stream(
    serve: Any, act: Act, *, size: int = 4 << 20, views: bool = False, method: Any = None
) -> Any:
    """Runs `act` with a stream that offers memory to a server that does as `serve` does."""
    method = method or grpc.stream_stream_rpc_method_handler(serve)
    async with _serving(method) as port:
        channel = open_channel(f"127.0.0.1:{port}")
        lender = Lender(size, views=views)
        stream = FrameStream(
            channel, "/x.X/S", EXECUTE_REQUEST, EXECUTE_RESPONSE, "a server", lender
        )
        try:
            return await act(stream)
        finally:
            await stream.close()
            await channel.close()


async def with_handler(
    handle: Any, act: Act, config: RpcConfig | None = None, **options: Any
) -> Any:
    """The same with a server that computes what `handle` does."""
    limits = Admission(config or RpcConfig())
    protocol = FrameProtocol(EXECUTE_REQUEST, EXECUTE_RESPONSE, handle, limits)
    return await with_stream(None, act, method=stream_tensor(protocol), **options)
