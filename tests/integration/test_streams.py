"""Many requests on one stream: cancelled, chunked, late, abandoned, and each answered right."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

import expertmesh
from expertmesh.codec.frames import CHUNK_BYTES
from expertmesh.rpc import loop
from expertmesh.rpc.deadline import Deadline
from expertmesh.v1 import expert_pb2, expert_pb2_grpc, router_pb2, router_pb2_grpc
from tests.mesh import LocalMesh, wait_until
from tests.rows import CLOSE, H, rows, truth
from tests.streams import mesh as mesh
from tests.streams import nothing_stays_in_flight as nothing_stays_in_flight
from tests.wire import (
    RawConnection,
    RawStream,
    admission,
    channel_to,
    chunk,
    devices_held,
    floats,
    forward,
    proto,
    wait_until_idle,
)

LAYERS = (0, 1, 2)  # dense, MoE, MoE


@pytest.fixture(params=["off", "auto"])
def client(
    mesh: LocalMesh, request: pytest.FixtureRequest
) -> Iterator[expertmesh.client.AsyncMesh]:
    """One whose frames go over gRPC, and one whose frames go over a data connection."""
    opened = loop.run(expertmesh.connect_async(mesh.address, data_connections=request.param))
    (link,) = opened._links.values()
    expected = "grpc" if request.param == "off" else "tcp"
    stream = loop.run(link.stream())
    loop.run(stream.settled())
    assert stream.transport == expected
    yield opened
    loop.run(opened.close())


@pytest.fixture
def call(mesh: LocalMesh) -> Iterator[RawStream]:
    with (
        channel_to(mesh.address) as channel,
        RawStream(router_pb2_grpc.RouterServiceStub(channel).ForwardStream) as stream,
    ):
        yield stream


@pytest.fixture(params=["grpc", "tcp"])
def raw(mesh: LocalMesh, request: pytest.FixtureRequest) -> Iterator[RawStream | RawConnection]:
    """The same messages either way."""
    with channel_to(mesh.address) as channel:
        method = router_pb2_grpc.RouterServiceStub(channel).ForwardStream
        if request.param == "grpc":
            with RawStream(method) as stream:
                yield stream
        else:
            connection = RawConnection(method, router_pb2.ForwardStreamResponse)
            yield connection
            connection.close()


def received(stream: RawStream | RawConnection, frame_id: int) -> torch.Tensor:
    """One whole answer, put together from its chunks; no other frame's messages in between."""
    first = stream.receive()
    assert (first.frame_id, first.WhichOneof("kind")) == (frame_id, "forward"), first
    return complete(first, iter(stream.receive, None))


def complete(first: Any, more: Iterator[Any]) -> torch.Tensor:
    tensor = first.forward.hidden_states
    data = tensor.data
    while len(data) < 4 * tensor.shape[0] * tensor.shape[1]:
        message = next(more)
        assert (message.frame_id, message.WhichOneof("kind")) == (first.frame_id, "chunk")
        assert 0 < len(message.chunk.data) <= CHUNK_BYTES
        data += message.chunk.data
    return floats(tensor, data)


# Cancellation.


def test_cancelled_frames_free_their_place_and_the_stream_goes_on(mesh, client) -> None:
    router = admission(mesh.routers[0])
    inputs = [rows(3, seed) for seed in range(8)]

    with devices_held(mesh):
        calls = [loop.submit(client.forward(hidden, 1)) for hidden in inputs]
        wait_until(lambda: router.frames == 8, 5.0, "all in flight")
        (link,) = client._links.values()
        stream = link._stream
        for call in calls[::2]:
            call.cancel()
        wait_until(lambda: router.frames == 4, 5.0, "down to the four that are left")
        assert router.bytes == 4 * inputs[0].nbytes
        assert link.in_flight == 4

    for call, hidden in list(zip(calls, inputs, strict=True))[1::2]:
        torch.testing.assert_close(call.result(10.0), truth(mesh, 1, hidden), **CLOSE)
    assert link._stream is stream
    assert not stream.broken.done()


def test_a_cancellation_reaches_the_expert_servers_before_they_compute(mesh, client) -> None:
    before = [server.shard.execution_counts()[1].clone() for server in mesh.servers]

    with devices_held(mesh):
        call = loop.submit(client.forward(rows(64), 1))
        wait_until(lambda: all(admission(s).frames for s in mesh.servers), 5.0, "forwarded")
        call.cancel()
        wait_until(lambda: not any(admission(s).frames for s in mesh.servers), 5.0, "told")

    with pytest.raises(CancelledError):
        call.result(0)
    loop.run(client.forward(rows(1), 2))
    after = [server.shard.execution_counts()[1] for server in mesh.servers]
    assert all(map(torch.equal, before, after))


def test_a_cancelled_member_does_not_disturb_the_others_of_its_batch(mesh, client) -> None:
    inputs = [rows(2, seed) for seed in range(6)]

    with devices_held(mesh):
        calls = [loop.submit(client.forward(hidden, 1)) for hidden in inputs]
        wait_until(lambda: admission(mesh.routers[0]).frames == 6, 5.0, "all in flight")
        calls[4].cancel()  # the last four wait for one batch together
    for index in (0, 1, 2, 3, 5):
        torch.testing.assert_close(
            calls[index].result(10.0), truth(mesh, 1, inputs[index]), **CLOSE
        )


def test_a_frame_given_up_half_sent_is_forgotten_with_its_late_chunks(mesh, call) -> None:
    hidden = rows(4)
    data = hidden.numpy().tobytes()

    call.send(
        forward(1, hidden, 7, length=100),
        router_pb2.ForwardStreamRequest(frame_id=7, cancel=router_pb2.CancelFrame()),
        chunk(7, data[100:]),
        router_pb2.ForwardStreamRequest(frame_id=99, cancel=router_pb2.CancelFrame()),
        forward(1, hidden, 8),
    )

    torch.testing.assert_close(received(call, 8), truth(mesh, 1, hidden), **CLOSE)
    assert call.finish() == []


def test_a_client_that_vanishes_leaves_nothing_behind(mesh) -> None:
    with (
        devices_held(mesh),
        channel_to(mesh.address) as channel,
        RawStream(router_pb2_grpc.RouterServiceStub(channel).ForwardStream) as stream,
    ):
        stream.send(forward(1, rows(4), 1), forward(1, rows(4), 2, length=8))
        wait_until(lambda: admission(mesh.routers[0]).frames == 2, 5.0, "in flight")
        stream.call.cancel()
        wait_until_idle(mesh)


def test_a_cancelled_unary_call_leaves_nothing_behind(mesh) -> None:
    request = router_pb2.ForwardRequest(layer=1, hidden_states=proto(rows(4)))
    with devices_held(mesh), channel_to(mesh.address) as channel:
        call = router_pb2_grpc.RouterServiceStub(channel).Forward.future(request)
        wait_until(lambda: admission(mesh.routers[0]).frames == 1, 5.0, "in flight")
        call.cancel()
        wait_until_idle(mesh)

    assert call.code() is grpc.StatusCode.CANCELLED


# Many at once, large and small.


def test_two_hundred_requests_of_mixed_sizes_are_each_answered_with_their_own_rows(
    mesh, client
) -> None:
    sizes = (1, 2, 3, 7, 64, 65, 300)
    inputs = [(LAYERS[i % 3], rows(sizes[i % len(sizes)], i)) for i in range(200)]

    async def ask() -> list[torch.Tensor]:
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(client.forward(hidden, layer)) for layer, hidden in inputs]
        return [call.result() for call in calls]

    answers = loop.run(ask())

    for (layer, hidden), answer in zip(inputs, answers, strict=True):
        torch.testing.assert_close(answer, truth(mesh, layer, hidden), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_answer_has_the_dtype_and_shape_of_the_request(mesh, client, dtype) -> None:
    hidden = rows(6).to(dtype).view(2, 3, H)

    answer = loop.run(client.forward(hidden, 1))

    assert (answer.dtype, answer.shape) == (dtype, hidden.shape)


FIVE_MIB = 5 * CHUNK_BYTES // (4 * H)  # rows


def test_small_requests_are_answered_while_a_large_one_is_still_arriving(mesh, raw) -> None:
    large, small = rows(FIVE_MIB), rows(2, seed=1)
    data = large.numpy().tobytes()
    cuts = [data[at : at + CHUNK_BYTES] for at in range(CHUNK_BYTES, len(data), CHUNK_BYTES)]

    raw.send(forward(0, large, 1, length=CHUNK_BYTES))
    for frame_id, cut in enumerate(cuts, start=2):
        raw.send(forward(1, small, frame_id))
        torch.testing.assert_close(received(raw, frame_id), truth(mesh, 1, small), **CLOSE)
        raw.send(chunk(1, cut))

    torch.testing.assert_close(received(raw, 1), truth(mesh, 0, large), **CLOSE)


def test_a_large_request_and_small_ones_share_a_stream(mesh, client) -> None:
    large, smalls = rows(FIVE_MIB), [rows(1, seed) for seed in range(20)]
    order: list[int] = []

    async def ask(index: int, hidden: torch.Tensor) -> torch.Tensor:
        answer = await client.forward(hidden, 0)
        order.append(index)
        return answer

    async def ask_all() -> list[torch.Tensor]:
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(ask(i, x)) for i, x in enumerate([large, *smalls])]
        return [call.result() for call in calls]

    answers = loop.run(ask_all())

    for hidden, answer in zip([large, *smalls], answers, strict=True):
        torch.testing.assert_close(answer, truth(mesh, 0, hidden), **CLOSE)
    assert order[-1] == 0  # nobody waited for the large one


def test_a_client_that_half_closes_gets_all_of_a_large_answer(mesh, call) -> None:
    large = rows(FIVE_MIB)
    data = large.numpy().tobytes()
    call.send(
        forward(0, large, 3, length=0),
        chunk(3, b""),
        *(chunk(3, data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)),
    )

    first, *more = call.finish()

    assert len(more) == 4
    torch.testing.assert_close(complete(first, iter(more)), truth(mesh, 0, large), **CLOSE)
    assert call.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("frame_id", [0, (1 << 63) + 5, (1 << 64) - 1])
def test_any_64_bits_are_a_frame_id(mesh, raw, frame_id) -> None:
    raw.send(forward(1, rows(1), frame_id))

    torch.testing.assert_close(received(raw, frame_id), truth(mesh, 1, rows(1)), **CLOSE)


def test_a_frame_id_may_be_used_again_once_it_has_been_answered(mesh, raw) -> None:
    for seed in range(3):
        raw.send(forward(1, rows(2, seed), 5))
        torch.testing.assert_close(received(raw, 5), truth(mesh, 1, rows(2, seed)), **CLOSE)


# Deadlines.


def test_each_hop_has_less_time_than_the_one_before(mesh, client, monkeypatch) -> None:
    at_router: list[float] = []
    at_expert: list[float] = []
    router = mesh.routers[0].router
    compute = router._compute

    def note_router(layer: Any, members: Any, deadline: Deadline) -> Any:
        at_router.append(deadline.remaining)
        return compute(layer, members, deadline)

    monkeypatch.setattr(router, "_compute", note_router)
    for server in mesh.servers:

        def note_expert(request: Any, deadline: Deadline, execute: Any = server._runner.execute):
            at_expert.append(deadline.remaining)
            return execute(request, deadline)

        monkeypatch.setattr(server._runner, "execute", note_expert)

    loop.run(client.forward(rows(64), 1, timeout=7.0))

    assert len(at_router) == 1
    assert len(at_expert) == 2
    assert 7.0 > at_router[0] > max(at_expert) > 5.0


def test_a_request_without_a_deadline_gets_the_routers_own(mesh, client, monkeypatch) -> None:
    at_expert: list[float] = []
    server = mesh.servers[0]
    execute = server._runner.execute

    def note(request: Any, deadline: Deadline) -> Any:
        at_expert.append(deadline.remaining)
        return execute(request, deadline)

    monkeypatch.setattr(server._runner, "execute", note)
    loop.run(client.forward(rows(64), 1, timeout=None))

    assert 25.0 < at_expert[0] < 30.0


def test_a_timeout_near_64_bits_is_not_wrapped_around(mesh, raw) -> None:
    raw.send(forward(1, rows(2), 1, timeout_us=(1 << 64) - 1))

    torch.testing.assert_close(received(raw, 1), truth(mesh, 1, rows(2)), **CLOSE)


@pytest.mark.parametrize("seconds", [1e14, 1e20, 1e300])
def test_any_time_that_is_left_fits_in_64_bits_of_microseconds(seconds) -> None:
    assert 0 < Deadline.after(seconds).timeout_us < 1 << 64


def test_what_expires_in_the_queue_is_never_computed(mesh) -> None:
    server = mesh.servers[0]
    held = [expert for expert in range(16) if server.shard.held(1)[expert]][:1]
    before = server.shard.execution_counts()[1].clone()
    request = expert_pb2.ExecuteRequest(
        layer=1,
        hidden_states=proto(rows(1)),
        expert_ids=proto(torch.tensor([held], dtype=torch.int32)),
        expert_weights=proto(torch.ones(1, 1)),
        epoch=1 << 40,
    )

    with channel_to(server.endpoint) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        with (
            devices_held(mesh),
            RawStream(stub.ExecuteStream) as stream,
        ):
            stream.send(
                expert_pb2.ExecuteStreamRequest(frame_id=1, execute=request, timeout_us=50_000)
            )
            late = stream.receive()
        assert late.error.reason == "DEADLINE_EXCEEDED"
        assert torch.equal(server.shard.execution_counts()[1], before)

        stub.Execute(request, timeout=10.0)
    assert server.shard.execution_counts()[1].sum() == before.sum() + 1


def test_a_frame_whose_chunks_never_come_expires(mesh, raw) -> None:
    raw.send(forward(1, rows(4), 1, length=10, timeout_us=50_000))

    late = raw.receive()

    assert late.error.reason == "DEADLINE_EXCEEDED"
    assert "chunks" in late.error.message
    wait_until_idle(mesh)
    raw.send(forward(1, rows(4), 1))
    torch.testing.assert_close(received(raw, 1), truth(mesh, 1, rows(4)), **CLOSE)


def test_a_frame_still_incomplete_when_the_client_ends_the_stream_is_refused(mesh, call) -> None:
    call.send(forward(1, rows(4), 1, length=10), forward(1, rows(4), 2))

    by_id = {message.frame_id: message for message in call.finish()}

    assert by_id[1].error.reason == "INVALID_REQUEST"
    assert "before all chunks" in by_id[1].error.message
    torch.testing.assert_close(
        floats(by_id[2].forward.hidden_states), truth(mesh, 1, rows(4)), **CLOSE
    )
