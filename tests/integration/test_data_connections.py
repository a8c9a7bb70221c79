"""Frames on a TCP connection beside the stream: agreed on, lost, and done without."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
import torch

import expertmesh
from expertmesh.codec.frames import CHUNK_BYTES
from expertmesh.config import RouterConfig, RpcConfig
from expertmesh.errors import ConfigError
from expertmesh.rpc import data_port, loop
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.server import GrpcServer
from expertmesh.rpc.stream import FrameStream
from expertmesh.v1 import router_pb2, router_pb2_grpc
from tests.data_connections import checkpoint as checkpoint
from tests.data_connections import connect, stream_of
from tests.data_connections import mesh as mesh
from tests.data_connections import method as method
from tests.data_connections import raw as raw
from tests.mesh import local_mesh, wait_until
from tests.rows import CLOSE, H, rows, truth
from tests.wire import (
    RawConnection,
    admission,
    channel_to,
    devices_held,
    floats,
    forward,
    wait_until_idle,
)

# Agreed on.


def test_both_hops_have_one_by_default_and_say_so(mesh) -> None:
    client = connect(mesh)
    transports = lambda: {s.transport for s in loop.run(client.status()).servers}  # noqa: E731
    wait_until(lambda: transports() == {"tcp"}, 5.0, "connected to the servers")

    assert stream_of(client).transport == "tcp"
    loop.run(client.close())


@pytest.mark.parametrize("count", [0, 1, 300, 5 * CHUNK_BYTES // (4 * H) + 1])
def test_answers_are_right_in_any_size(mesh, count) -> None:
    hidden = rows(count)
    client = connect(mesh)

    answer = loop.run(client.forward(hidden, 0))

    torch.testing.assert_close(answer, truth(mesh, 0, hidden), **CLOSE)
    loop.run(client.close())


def test_frames_sent_before_it_is_there_are_answered_too(mesh) -> None:
    """They go over gRPC, those after it over the connection, and each is answered where it came."""

    async def ask() -> tuple[list[torch.Tensor], str]:
        async with expertmesh.connect_async(mesh.address) as client:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(client.forward(each, 1)) for each in inputs[:20]]
            (link,) = client._links.values()
            stream = await link.stream()
            async with asyncio.timeout(5.0):
                while stream.transport != "tcp":
                    calls.append(asyncio.ensure_future(client.forward(inputs[len(calls)], 1)))
                    await asyncio.sleep(0.001)
                calls.append(asyncio.ensure_future(client.forward(inputs[len(calls)], 1)))
                await asyncio.wait(calls)
            return [call.result() for call in calls], stream.transport

    inputs = [rows(2, seed) for seed in range(5100)]

    answers, transport = loop.run(ask())

    assert transport == "tcp"
    for hidden, answer in zip(inputs, answers, strict=False):
        torch.testing.assert_close(answer, truth(mesh, 1, hidden), **CLOSE)


def test_shared_memory_and_a_data_connection_go_together(mesh) -> None:
    hidden = rows(1000)
    client = connect(mesh, shared_memory="auto")
    stream = stream_of(client)
    wait_until(lambda: stream.transport == "shm", 5.0, "shared")

    for seed in range(3):
        hidden = rows(1000, seed)
        answer = loop.run(client.forward(hidden, 1))
        torch.testing.assert_close(answer, truth(mesh, 1, hidden), **CLOSE)
    assert stream._lender is not None
    assert stream._lender.lent_bytes == 0
    loop.run(client.close())


# Lost.


def test_a_connection_that_nobody_waited_for_ends_without_its_stream(mesh, method) -> None:
    """A caller that has given up on it sends everything on the stream, which goes on."""
    late = RawConnection(method, router_pb2.ForwardStreamResponse)
    late.socket.close()
    router = mesh.routers[0]

    late.send_on_call(forward(1, rows(2), 1))

    answer = next(late.call)
    torch.testing.assert_close(
        floats(answer.forward.hidden_states), truth(mesh, 1, rows(2)), **CLOSE
    )
    late.close()
    wait_until(lambda: not admission(router).streams, 5.0, "ended")


def test_a_frame_in_flight_on_a_lost_connection_is_asked_again(mesh) -> None:
    client = connect(mesh)
    stream = stream_of(client)
    with devices_held(mesh):
        call = loop.submit(client.forward(rows(4), 1))
        wait_until(lambda: admission(mesh.routers[0]).frames == 1, 5.0, "in flight")
        loop.run(_abort(stream))
        wait_until(stream.broken.done, 5.0, "broken")

    torch.testing.assert_close(call.result(10.0), truth(mesh, 1, rows(4)), **CLOSE)
    assert stream_of(client) is not stream
    loop.run(client.close())
    wait_until_idle(mesh)


async def _abort(stream: FrameStream) -> None:
    assert stream._connection is not None
    stream._connection.abort()


def test_a_router_that_loses_connections_to_servers_answers_all_the_same(mesh) -> None:
    client = connect(mesh)
    links = mesh.routers[0].router.pool._links.values()
    for _ in range(3):
        wait_until(lambda: all(link.transport == "tcp" for link in links), 5.0, "connected")
        calls = [loop.submit(client.forward(rows(3, seed), 1)) for seed in range(8)]
        for link in links:
            loop.run(_abort(link._stream))
        for seed, call in enumerate(calls):
            torch.testing.assert_close(call.result(10.0), truth(mesh, 1, rows(3, seed)), **CLOSE)
    loop.run(client.close())
    wait_until_idle(mesh)


def test_a_client_that_vanishes_leaves_nothing_behind(mesh, raw) -> None:
    with devices_held(mesh):
        raw.send(forward(1, rows(4), 1), forward(1, rows(4), 2, length=8))
        wait_until(lambda: admission(mesh.routers[0]).frames == 2, 5.0, "in flight")
        raw.socket.close()
        wait_until_idle(mesh)


def test_answers_that_a_client_does_not_read_keep_its_place_taken(checkpoint) -> None:
    """Else the server would hold them without limit."""
    path, _ = checkpoint
    rpc = RpcConfig(host="127.0.0.1", drain_s=1.0, max_inflight_frames=4)
    large = rows(8 * CHUNK_BYTES // (4 * H))
    with (
        local_mesh(path, backend="reference", router_rpc=rpc) as mesh,
        channel_to(mesh.address) as channel,
    ):
        method = router_pb2_grpc.RouterServiceStub(channel).ForwardStream
        raw = RawConnection(method, router_pb2.ForwardStreamResponse)
        # More than the kernel holds for one socket.
        for frame_id in range(1, 9):
            raw.send(forward(0, large, frame_id))
        router = mesh.routers[0]
        wait_until(lambda: router.router.counts.answered_requests >= 4, 20.0, "answered")
        held = admission(router).frames
        outcomes: dict[int, str] = {}
        got = dict.fromkeys(range(1, 9), 0)
        while len(outcomes) < 8:
            message = raw.receive()
            kind = message.WhichOneof("kind")
            if kind == "error":
                outcomes[message.frame_id] = message.error.reason
                continue
            data = message.chunk if kind == "chunk" else message.forward.hidden_states
            got[message.frame_id] += len(data.data)
            if got[message.frame_id] == large.nbytes:
                outcomes[message.frame_id] = "OK"
        raw.close()
        wait_until_idle(mesh)

    assert held > 0
    assert sorted(set(outcomes.values())) == ["OK", "QUEUE_FULL"]


# Done without.


def test_a_server_that_wants_none_is_asked_over_grpc(checkpoint) -> None:
    path, model = checkpoint
    rpc = RpcConfig(host="127.0.0.1", drain_s=1.0, data_connections="off")
    with local_mesh(path, backend="reference", router_rpc=rpc, rpc=rpc) as mesh:
        mesh.model = model
        with expertmesh.connect(mesh.address) as client:
            answer = client.forward(rows(5), 1)
            stream = stream_of(client._mesh)
            loop.run(stream.settled())

            assert stream.transport == "grpc"
            assert {server.transport for server in client.status().servers} == {"grpc"}
    torch.testing.assert_close(answer, truth(mesh, 1, rows(5)), **CLOSE)


def test_a_router_that_wants_none_asks_over_grpc(checkpoint) -> None:
    path, _ = checkpoint
    config = RouterConfig(data_connections="off")
    with (
        local_mesh(path, backend="reference", router_config=config) as mesh,
        expertmesh.connect(mesh.address) as client,
    ):
        client.forward(rows(5), 1)

        assert {server.transport for server in client.status().servers} == {"grpc"}


@pytest.mark.parametrize("answers", ["closed", "silent"])
def test_a_port_that_cannot_be_reached_costs_nothing(mesh, answers, monkeypatch, caplog) -> None:
    """A firewall may refuse the port, or drop what is sent there."""
    monkeypatch.setattr(data_port, "_CONNECT_S", 0.3)
    caplog.set_level("INFO")
    port = mesh.routers[0]._server._data_port
    with socket.create_server(("127.0.0.1", 0)) as silent:
        number = silent.getsockname()[1]
        if answers == "closed":
            silent.close()
        monkeypatch.setattr(port, "port", number)
        with expertmesh.connect(mesh.address) as client:
            stream = stream_of(client._mesh)
            answer = client.forward(rows(5), 1)
            loop.run(stream.settled())

            assert stream.transport == "grpc"
            again = client.forward(rows(5), 1)
            assert not stream.broken.done()
    for each in (answer, again):
        torch.testing.assert_close(each, truth(mesh, 1, rows(5)), **CLOSE)
    assert f"no data connection to 127.0.0.1:{number}" in caplog.text


def test_of_a_name_with_many_addresses_the_right_one_is_found(mesh, monkeypatch) -> None:
    """A headless Service of Kubernetes: the stream leads to one router, the name to all of them."""
    other = socket.create_server(("127.0.0.2", mesh.routers[0]._server._data_port.port))
    addresses = data_port._addresses

    async def several(host: str, port: int) -> list[tuple[str, int]]:
        return [("127.0.0.3", port), ("127.0.0.2", port), *await addresses(host, port)]

    def refuse() -> None:
        stranger, _ = other.accept()
        stranger.close()

    refusing = threading.Thread(target=refuse)
    refusing.start()
    monkeypatch.setattr(data_port, "_addresses", several)
    client = connect(mesh)
    refusing.join(5.0)

    torch.testing.assert_close(
        loop.run(client.forward(rows(2), 1)), truth(mesh, 1, rows(2)), **CLOSE
    )
    loop.run(client.close())
    other.close()


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        ("10.0.0.1:50051", "10.0.0.1"),
        ("router.svc:50051", "router.svc"),
        ("[::1]:50051", "::1"),
        ("unix:/run/router.sock", ""),
        ("dns:///router:50051", ""),
        ("router", ""),
    ],
)
def test_where_a_caller_connects_to(endpoint, host) -> None:
    assert data_port.host_of(endpoint) == host
    assert data_port.host_of(endpoint, "off") == ""


def test_a_taken_port_is_refused_at_the_start(mesh) -> None:
    taken = mesh.routers[0]._server._data_port.port
    config = RpcConfig(host="127.0.0.1", data_port=taken)

    async def start() -> None:
        server = GrpcServer(config, Admission(config), data_port=DataPort.of(config))
        try:
            await server.start()
        finally:
            await server.stop()

    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{taken} for data conn"):
        loop.run(start())


@pytest.mark.parametrize("make", [RpcConfig, RouterConfig], ids=lambda each: each.__name__)
def test_a_mode_that_is_none_is_refused(make) -> None:
    with pytest.raises(ConfigError, match="data_connections is 'on', expected auto or off"):
        make(data_connections="on")
