"""Calls and streams that are too large, too late, too many, given up, or garbage."""

from __future__ import annotations

import grpc
import pytest
import torch

from expertmesh.codec import wire
from expertmesh.config import SharedMemoryConfig
from expertmesh.errors import DeadlineError, MessageTooLargeError, OverloadedError
from expertmesh.router_link import RouterLink
from expertmesh.rpc import loop
from expertmesh.rpc.deadline import Deadline
from expertmesh.v1 import router_pb2, tensor_pb2
from tests.bad_input import LIMITS, MOE, RawStreamOf, execute, failure, truth
from tests.bad_input import channel as channel
from tests.bad_input import client as client
from tests.bad_input import mesh as mesh
from tests.bad_input import router as router
from tests.bad_input import sessions as sessions
from tests.bad_input import shard as shard
from tests.bad_input import stream as stream
from tests.bad_input import (
    the_cluster_serves_on_and_nothing_leaks as the_cluster_serves_on_and_nothing_leaks,
)
from tests.mesh import wait_until
from tests.rows import CLOSE, H, rows
from tests.wire import (
    admission,
    chunk,
    details,
    devices_held,
    floats,
    forward,
    proto,
    wait_until_idle,
)

# Sizes.

OVER_GRPC = LIMITS.max_request_bytes + (9 << 20)


def test_a_unary_message_over_the_limit_of_grpc_is_refused(channel) -> None:
    call = channel.unary_unary("/expertmesh.v1.RouterService/Forward")

    error = failure(lambda: call(bytes(OVER_GRPC), timeout=10.0))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()


def test_what_grpc_says_of_a_large_message_is_too_large_to_the_python_client(mesh) -> None:
    async def send() -> None:
        link = RouterLink(mesh.address, SharedMemoryConfig(), "off", proxy="")
        call = link._channel.unary_unary("/expertmesh.v1.RouterService/Forward")
        try:
            await link.control(call, bytes(OVER_GRPC), Deadline.after(10.0))
        finally:
            await link.close()

    with pytest.raises(MessageTooLargeError, match="send fewer rows"):
        loop.run(send())


def test_a_shape_over_the_limit_is_refused_before_its_chunks_are_sent(stream) -> None:
    huge = tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1 << 40, H])
    body = router_pb2.ForwardRequest(layer=MOE, hidden_states=huge)

    stream.send(router_pb2.ForwardStreamRequest(frame_id=1, forward=body))

    assert stream.receive().error.reason == "MESSAGE_TOO_LARGE"


# Deadlines.


def test_an_expired_deadline_is_a_typed_error_of_the_frame(mesh, stream) -> None:
    with devices_held(mesh):
        stream.send(forward(MOE, rows(2), 1, timeout_us=50_000))
        error = stream.receive().error

    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert error.reason == "DEADLINE_EXCEEDED"
    assert "allow more time, or send fewer rows" in error.message


def test_an_expired_deadline_of_a_unary_call_is_the_status_of_grpc(mesh, router) -> None:
    request = router_pb2.ForwardRequest(layer=MOE, hidden_states=proto(rows(2)))

    with devices_held(mesh):
        error = failure(lambda: router.Forward(request, timeout=0.1))

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("timeout", [0.05, 0.0, -1.0])
def test_an_expired_deadline_is_a_deadline_error_in_the_python_client(
    mesh, client, timeout
) -> None:
    with devices_held(mesh), pytest.raises(DeadlineError, match="allow more time"):
        client.forward(rows(2), MOE, timeout=timeout)


# Queues.


def test_a_router_with_too_much_in_flight_says_when_to_come_back(mesh, router, stream) -> None:
    with devices_held(mesh):
        stream.send(*(forward(MOE, rows(1), frame_id) for frame_id in range(1, 5)))
        refusal = stream.receive()
        request = router_pb2.ForwardRequest(layer=MOE, hidden_states=proto(rows(1)))
        error = failure(lambda: router.Forward(request, timeout=5.0))
    answered = {stream.receive().WhichOneof("kind") for _ in range(3)}

    assert refusal.frame_id == 4
    assert refusal.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert refusal.error.reason == "QUEUE_FULL"
    assert refusal.error.retry_after_s == pytest.approx(0.05)
    assert "the limit is 3: retry later or elsewhere" in refusal.error.message
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error) == ("QUEUE_FULL", [], pytest.approx(0.05))
    assert answered == {"forward"}


def test_a_router_with_too_much_in_flight_is_overloaded_to_the_python_client(mesh, client) -> None:
    with RawStreamOf(mesh) as stream:
        stream.send(*(forward(MOE, rows(1), frame_id, length=8) for frame_id in (1, 2, 3)))
        wait_until(lambda: admission(mesh.routers[0]).frames == 3, 5.0, "full")
        with pytest.raises(OverloadedError, match="retry later") as caught:
            client.forward(rows(1), MOE)

    assert caught.value.retry_after_s == pytest.approx(0.05)


def test_an_expert_server_with_a_full_queue_says_when_to_come_back(mesh, shard) -> None:
    with devices_held(mesh):
        waiting = shard.Execute.future(execute(mesh, [0]), timeout=10.0)
        wait_until(lambda: mesh.servers[0]._runner._queued == 1, 5.0, "queued")
        error = failure(lambda: shard.Execute(execute(mesh, [0]), timeout=5.0))

    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error) == ("QUEUE_FULL", [], pytest.approx(0.05))
    assert "retry later or on a replica" in error.details()
    assert len(waiting.result().hidden_states.data) == 4 * H


# The stream itself.

GARBAGE = {
    "random": bytes(range(255, 200, -1)),
    "truncated": forward(MOE, rows(2)).SerializeToString()[:100],
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no kind": wire.field_varint(1, 5),
    "empty": b"",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_its_stream_and_no_other(mesh, channel, stream, garbage) -> None:
    stream.send(forward(MOE, rows(3), 1, length=10))
    call = channel.stream_stream("/expertmesh.v1.RouterService/ForwardStream")

    error = failure(lambda: list(call(iter([garbage]), timeout=10.0)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)[0] == "INVALID_REQUEST"
    stream.send(chunk(1, rows(3).numpy().tobytes()[10:]))
    got = floats(stream.receive().forward.hidden_states)
    torch.testing.assert_close(got, truth(mesh, rows(3)), **CLOSE)


@pytest.mark.parametrize("garbage", [GARBAGE["random"], GARBAGE["http"]], ids=["random", "http"])
def test_garbage_in_a_unary_call_is_refused(channel, garbage) -> None:
    call = channel.unary_unary("/expertmesh.v1.RouterService/Forward")

    error = failure(lambda: call(garbage, timeout=10.0))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)[0] == "INVALID_REQUEST"


def test_a_frame_whose_body_is_garbage_fails_alone(mesh, channel) -> None:
    call = channel.stream_stream("/expertmesh.v1.RouterService/ForwardStream")
    bad = wire.field_varint(1, 1) + wire.field_bytes(2, b"\x12\x7fshort")
    good = forward(MOE, rows(2), 2).SerializeToString()

    raw = list(call(iter([bad, good]), timeout=10.0))

    replies = {r.frame_id: r for r in map(router_pb2.ForwardStreamResponse.FromString, raw)}
    assert replies[1].error.reason == "INVALID_REQUEST"
    assert "the message is cut" in replies[1].error.message
    got = floats(replies[2].forward.hidden_states)
    torch.testing.assert_close(got, truth(mesh, rows(2)), **CLOSE)


def test_a_frame_id_used_twice_in_flight_ends_the_stream(stream) -> None:
    stream.send(forward(MOE, rows(2), 7, length=10), forward(MOE, rows(2), 7))

    error = failure(stream.receive)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error) == ("INVALID_REQUEST", ["frame_id"], None)
    assert "frame_id 7 is in flight already" in error.details()


def test_more_chunks_than_the_shape_holds_fail_the_frame_alone(mesh, stream) -> None:
    stream.send(forward(MOE, rows(2), 1, length=10), chunk(1, bytes(503)))
    error = stream.receive().error
    stream.send(forward(MOE, rows(2), 2))

    assert error.reason == "INVALID_REQUEST"
    assert error.field == "hidden_states.data"
    assert "chunks bring 513 bytes but the shape [2, 64] holds 512" in error.message
    got = floats(stream.receive().forward.hidden_states)
    torch.testing.assert_close(got, truth(mesh, rows(2)), **CLOSE)


def test_a_cancelled_call_is_told_so_and_leaves_nothing(mesh, router) -> None:
    request = router_pb2.ForwardRequest(layer=MOE, hidden_states=proto(rows(2)))

    with devices_held(mesh):
        call = router.Forward.future(request)
        wait_until(lambda: admission(mesh.routers[0]).frames == 1, 5.0, "in flight")
        call.cancel()
        wait_until_idle(mesh)

    assert call.code() is grpc.StatusCode.CANCELLED
