"""How clients judge routers: one that lives is waited for, one that does not is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

import expertmesh
from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard
from expertmesh.rpc import loop
from expertmesh.v1 import router_pb2 as pb
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until

SLOW_S = 1.2  # for one request: long after its router was asked whether it is there


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    with local_mesh(path, shards=1, routers=2) as running:
        yield running


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device takes its time for every request."""
    compute = ExpertShard.compute

    def slowly(*arguments: Any) -> torch.Tensor:
        time.sleep(SLOW_S)
        return compute(*arguments)

    monkeypatch.setattr(ExpertShard, "compute", slowly)
    monkeypatch.setattr(DeviceRunner, "execute_now", lambda self, request: None)


def _suspects(client: expertmesh.Mesh) -> list[str]:
    return [link.address for link in client._mesh._links.values() if link.suspected]


def test_a_router_whose_servers_take_long_is_waited_for_and_counts_once(
    mesh: LocalMesh, slow: None
) -> None:
    before = sum(router.router.counts.answered_requests for router in mesh.routers)
    with expertmesh.connect(mesh.address) as client:
        hidden = torch.randn(3, client.describe().hidden_size)
        for _ in range(2):
            client.forward(hidden, 1)
        suspects = _suspects(client)

    assert suspects == []
    assert sum(router.router.counts.answered_requests for router in mesh.routers) == before + 2


class Mute:
    """Listens as a router would: takes every call, and answers none until it is told to."""

    def __init__(self, describe: Callable[[], Awaitable[bytes]]) -> None:
        self._describe = describe
        self.speaks = asyncio.Event()
        self.taken = 0

    async def start(self) -> str:
        self._server = grpc.aio.server()
        handlers = {
            "Describe": grpc.unary_unary_rpc_method_handler(self._answer),
            "GetLoad": grpc.unary_unary_rpc_method_handler(self._never),
            "GetStatus": grpc.unary_unary_rpc_method_handler(self._never),
            "ForwardStream": grpc.stream_stream_rpc_method_handler(self._take),
        }
        name = "expertmesh.v1.RouterService"
        generic = grpc.method_handlers_generic_handler(name, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(0)

    async def _answer(self, _: bytes, __: object) -> bytes:
        await self.speaks.wait()
        return await self._describe()

    async def _never(self, _: bytes, context: grpc.aio.ServicerContext) -> bytes:  # type: ignore[type-arg]
        await self.speaks.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no such thing here")
        return b""

    async def _take(self, messages: Any, _: object) -> None:
        async for _message in messages:
            self.taken += 1


@pytest.fixture
def mute(mesh: LocalMesh) -> Iterator[tuple[Mute, str]]:
    """One that is mute, and its address before that of a router that answers."""

    async def describe() -> bytes:
        return pb.DescribeResponse().SerializeToString()

    async def make() -> tuple[Mute, str]:
        made = Mute(describe)
        return made, await made.start()

    made, address = loop.run(make())
    yield made, address
    loop.run(made.stop())


def test_a_mute_address_delays_no_call_and_is_tried_again_when_it_speaks(
    mesh: LocalMesh, mute: tuple[Mute, str]
) -> None:
    silent, address = mute
    started = time.monotonic()
    with expertmesh.connect(f"{address},{mesh.routers[0].address}") as client:
        hidden = torch.randn(3, client.describe().hidden_size)
        for _ in range(8):
            client.forward(hidden, 1)
        client.load()
        assert len(client.statuses()) == 2
        assert client.status().ready
        took = time.monotonic() - started
        assert _suspects(client) == [address]

        mesh_loop = loop.shared_loop()
        mesh_loop.call_soon_threadsafe(silent.speaks.set)
        wait_until(lambda: not _suspects(client), 5.0, "trusted again")

    assert took < 3.0


def test_what_a_mute_router_was_asked_for_goes_to_another_before_long(
    mesh: LocalMesh, mute: tuple[Mute, str]
) -> None:
    silent, address = mute

    async def run() -> tuple[list[float], list[str]]:
        async with expertmesh.connect_async(mesh.routers[0].address) as client:
            client._links[address] = client._link(address)  # it was there, and fell silent
            hidden = torch.randn(3, client.describe().hidden_size)

            async def ask() -> float:
                started = time.monotonic()
                await client.forward(hidden, 1, timeout=20.0)
                return time.monotonic() - started

            took = await asyncio.gather(*(ask() for _ in range(12)))
            return took, [link.address for link in client._links.values() if link.suspected]

    took, suspects = loop.run(run())

    assert silent.taken > 0, "it was asked"
    assert suspects == [address]
    assert max(took) < 2.0
