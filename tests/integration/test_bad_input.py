"""Every row of the table in docs/protocol.md, over the wire, against a whole cluster.

After each test a good request is answered right, and nothing is left in flight anywhere.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import expertmesh
import router_service.servicer
from expertmesh.codec import messages, wire
from expertmesh.config import ExpertConfig, RpcConfig, SharedMemoryConfig
from expertmesh.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    MeshError,
    MessageTooLargeError,
    MismatchError,
    NonFiniteError,
    OverloadedError,
    UnavailableError,
    UnknownLayerError,
)
from expertmesh.router_link import RouterLink
from expertmesh.rpc import loop, session
from expertmesh.rpc.deadline import Deadline
from expertmesh.v1 import (
    control_pb2,
    control_pb2_grpc,
    expert_pb2,
    expert_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    tensor_pb2,
)
from router_service.server import RouterServer, open_model
from tests import mesh as meshes
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.wire import (
    RawStream,
    admission,
    channel_to,
    chunk,
    details,
    devices_held,
    floats,
    forward,
    proto,
    wait_until_idle,
)

H = 64
E, K = 16, 4  # experts of a layer, of which a token gets K
MOE, DENSE = 1, 0  # layers
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
#: Small, so that a test reaches them.
LIMITS = RpcConfig(host="127.0.0.1", drain_s=1.0, max_request_bytes=64 << 10, max_inflight_frames=3)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def sessions() -> Iterator[weakref.WeakSet[session.FrameSession]]:
    """Every stream that a server has served."""
    seen: weakref.WeakSet[session.FrameSession] = weakref.WeakSet()
    start = session.FrameSession.__init__

    def note(self: session.FrameSession, *arguments: Any) -> None:
        start(self, *arguments)
        seen.add(self)

    session.FrameSession.__init__ = note  # type: ignore[method-assign]
    yield seen
    session.FrameSession.__init__ = start  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def mesh(
    tmp_path_factory: pytest.TempPathFactory, sessions: weakref.WeakSet[session.FrameSession]
) -> Iterator[LocalMesh]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    quick = ExpertConfig(max_queue=1, announce_every_s=0.05)
    with local_mesh(path, routers=0, backend="reference", config=quick) as cluster:
        cluster.model = model
        cluster.routers.append(loop.run(_start_router(cluster)))
        cluster.wait()
        yield cluster


async def _start_router(mesh: LocalMesh) -> RouterServer:
    router = RouterServer(
        open_model(mesh.path),
        router_id="router",
        controller=mesh.controller.address,
        host="127.0.0.1",
        rpc=LIMITS,
    )
    await router.start()
    return router


@pytest.fixture(scope="module")
def client(mesh: LocalMesh) -> Iterator[expertmesh.client.Mesh]:
    with expertmesh.connect(mesh.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def channel(mesh: LocalMesh) -> Iterator[grpc.Channel]:
    with channel_to(mesh.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def router(channel: grpc.Channel) -> router_pb2_grpc.RouterServiceStub:
    return router_pb2_grpc.RouterServiceStub(channel)


@pytest.fixture
def stream(router: router_pb2_grpc.RouterServiceStub) -> Iterator[RawStream]:
    with RawStream(router.ForwardStream) as opened:
        yield opened


@pytest.fixture
def control(mesh: LocalMesh) -> Iterator[control_pb2_grpc.ControlServiceStub]:
    with channel_to(mesh.controller.address) as opened:
        yield control_pb2_grpc.ControlServiceStub(opened)


@pytest.fixture
def shard(mesh: LocalMesh) -> Iterator[expert_pb2_grpc.ExpertServiceStub]:
    """The first expert server, which holds the first half of the experts."""
    with channel_to(mesh.servers[0].endpoint) as opened:
        yield expert_pb2_grpc.ExpertServiceStub(opened)


@pytest.fixture(autouse=True)
def the_cluster_serves_on_and_nothing_leaks(
    mesh: LocalMesh,
    client: expertmesh.client.Mesh,
    sessions: weakref.WeakSet[session.FrameSession],
) -> Iterator[None]:
    yield
    wait_until_idle(mesh)
    assert not any(each._frames and each._frames._frames for each in sessions)
    assert not any(queue._waiting or queue._running for queue in _queues(mesh))
    torch.testing.assert_close(client.forward(rows(5), MOE), truth(mesh, rows(5)), **CLOSE)


def _queues(mesh: LocalMesh) -> list[Any]:
    return list(mesh.routers[0].router._queues.values())


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def put(tensor: torch.Tensor, where: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[where] = value
    return changed


def truth(mesh: LocalMesh, hidden: torch.Tensor) -> torch.Tensor:
    assert mesh.model is not None
    with torch.no_grad():
        output: torch.Tensor = mesh.model.model.layers[MOE].mlp(hidden[None])[0]
    return output


def ids_of(*experts: int) -> torch.Tensor:
    return torch.tensor([experts, experts, experts], dtype=torch.int32)


IDS, WEIGHTS = ids_of(0, 9, 15), torch.full((3, 3), 0.5)
FP8_ROWS, ONES = rows(3).to(torch.float8_e4m3fn), torch.ones(3)


@dataclass(frozen=True)
class Bad:
    """A request that the router refuses, and how."""

    error: type[MeshError]
    field: str  # what BadRequest names
    says: str  # part of the message: the value, or what to do
    hidden: torch.Tensor = field(default_factory=lambda: rows(3))
    layer: int = MOE
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    by_client: bool = True  # whether our own client would send it so

    def body(self) -> router_pb2.ForwardRequest:
        request = router_pb2.ForwardRequest(layer=self.layer, hidden_states=proto(self.hidden))
        if self.ids is not None:
            request.expert_ids.CopyFrom(proto(self.ids))
        if self.weights is not None:
            request.expert_weights.CopyFrom(proto(self.weights))
        if self.scale is not None:
            request.hidden_states_scale.CopyFrom(proto(self.scale))
        return request


#: By the row's name in docs/protocol.md.
REFUSED: dict[str, Bad] = {
    "wrong-dtype": Bad(
        InvalidRequestError, "hidden_states.data_type", "convert them", rows(3).to(torch.int32)
    ),
    "fp8-without-scales": Bad(
        InvalidRequestError,
        "hidden_states_scale",
        "send a float32 scale for each row, or convert to float32, float16 or bfloat16",
        FP8_ROWS,
    ),
    "scales-without-fp8": Bad(
        InvalidRequestError, "hidden_states_scale", "leave them out", scale=ONES, by_client=False
    ),
    "scales-of-another-length": Bad(
        InvalidRequestError, "hidden_states_scale.shape", "expected [3]", FP8_ROWS, scale=ONES[:2],
        by_client=False,
    ),
    "scales-not-float32": Bad(
        InvalidRequestError, "hidden_states_scale.data_type", "expected float32", FP8_ROWS,
        scale=ONES.half(), by_client=False,
    ),
    "scale-zero": Bad(
        InvalidRequestError, "hidden_states_scale", "row 1, expected above 0", FP8_ROWS,
        scale=put(ONES, (1,), 0.0), by_client=False,
    ),
    "scale-nan": Bad(
        InvalidRequestError, "hidden_states_scale", "nan in row 2", FP8_ROWS,
        scale=put(ONES, (2,), NAN), by_client=False,
    ),
    "nan-in-fp8": Bad(
        NonFiniteError, "hidden_states", "row 1, column 5",
        put(rows(3), (1, 5), NAN).to(torch.float8_e4m3fn), scale=ONES, by_client=False,
    ),
    "wrong-rank": Bad(
        InvalidRequestError,
        "hidden_states.shape",
        "flatten the leading dimensions",
        rows(4).view(2, 2, H),
        by_client=False,  # it flattens
    ),
    "no-hidden-states": Bad(
        InvalidRequestError, "hidden_states.shape", "expected [tokens, 64]", torch.empty(0),
        by_client=False,  # it sends [0, 0]
    ),
    "wrong-hidden-size": Bad(
        InvalidRequestError, "hidden_states.shape", "width 63, expected 64", torch.zeros(3, 63)
    ),
    "unknown-layer": Bad(UnknownLayerError, "layer", "which has 0, 1, 2: see Describe", layer=3),
    "negative-layer": Bad(UnknownLayerError, "layer", "layer -1", layer=-1),
    "nan": Bad(NonFiniteError, "hidden_states", "row 1, column 2", put(rows(3), (1, 2), NAN)),
    "infinity": Bad(
        NonFiniteError, "hidden_states", "non_finite_policy PASS", put(rows(3), (2, 0), -INF)
    ),
    "weights-not-finite": Bad(
        NonFiniteError,
        "expert_weights",
        "mend the caller's gate",
        ids=IDS,
        weights=put(WEIGHTS, (0, 0), NAN),
    ),
    "id-too-high": Bad(
        InvalidRequestError, "expert_ids", "hold 16, expected 0 to 15", ids=ids_of(0, 9, 16),
        weights=WEIGHTS,
    ),
    "id-too-low": Bad(
        InvalidRequestError, "expert_ids", "hold -2", ids=ids_of(0, 9, -2), weights=WEIGHTS
    ),
    "doubled-id": Bad(
        InvalidRequestError, "expert_ids", "name it once", ids=ids_of(9, 0, 9), weights=WEIGHTS
    ),
    "ids-without-weights": Bad(InvalidRequestError, "expert_weights", "both", ids=IDS),
    "weights-without-ids": Bad(InvalidRequestError, "expert_ids", "both", weights=WEIGHTS),
    "weights-of-another-shape": Bad(
        InvalidRequestError, "expert_weights.shape", "expected [3, 3]", ids=IDS,
        weights=WEIGHTS[:, :2],
    ),
    "ids-of-another-length": Bad(
        InvalidRequestError, "expert_ids.shape", "expected [3, k]", ids=IDS[:2], weights=WEIGHTS[:2]
    ),
    "ids-not-int32": Bad(
        InvalidRequestError, "expert_ids.data_type", "expected int32", ids=IDS.long(),
        weights=WEIGHTS, by_client=False,  # it converts
    ),
    "weights-not-float32": Bad(
        InvalidRequestError, "expert_weights.data_type", "expected float32", ids=IDS,
        weights=WEIGHTS.half(), by_client=False,  # it converts
    ),
    "ids-for-a-dense-layer": Bad(
        InvalidRequestError, "expert_ids", "leave expert_ids out", layer=DENSE, ids=IDS,
        weights=WEIGHTS,
    ),
    "tensor-too-large": Bad(
        MessageTooLargeError, "hidden_states", "send fewer rows", torch.zeros(300, H)
    ),
}  # fmt: skip
refused = pytest.mark.parametrize("bad", REFUSED.values(), ids=REFUSED)


def failure(call: Callable[[], Any]) -> grpc.RpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


@refused
def test_a_unary_call_says_what_is_wrong_with_a_rich_status(router, bad) -> None:
    error = failure(lambda: router.Forward(bad.body(), timeout=10.0))

    assert error.code() is bad.error.code
    assert bad.says in error.details()
    assert details(error) == (bad.error.reason, [bad.field], None)


@refused
def test_a_stream_says_it_of_the_frame_and_goes_on(mesh, stream, bad) -> None:
    stream.send(router_pb2.ForwardStreamRequest(frame_id=1, forward=bad.body()))
    error = stream.receive().error
    stream.send(forward(MOE, rows(3), 2))
    answer = stream.receive()

    assert error.code == bad.error.code.value[0]
    assert error.reason == bad.error.reason
    assert error.field == bad.field
    assert bad.says in error.message
    assert error.retry_after_s == 0
    torch.testing.assert_close(floats(answer.forward.hidden_states), truth(mesh, rows(3)), **CLOSE)


@pytest.mark.parametrize(
    "bad",
    [bad for bad in REFUSED.values() if bad.by_client],
    ids=[name for name, bad in REFUSED.items() if bad.by_client],
)
def test_the_python_client_raises_the_class_that_the_table_names(client, bad) -> None:
    with pytest.raises(bad.error) as caught:
        client.forward(bad.hidden, bad.layer, expert_ids=bad.ids, expert_weights=bad.weights)

    assert type(caught.value) is bad.error
    assert bad.says in caught.value.message
    assert caught.value.field == bad.field


@pytest.mark.parametrize(
    ("hidden", "ids", "weights"),
    [
        (rows(3).double(), None, None),
        (rows(3).to(torch.complex64), None, None),
        (torch.tensor(1.0), None, None),
        (rows(3), IDS.float(), WEIGHTS),
        (rows(3), IDS.bool(), WEIGHTS),
        (rows(3), IDS.to(torch.complex64), WEIGHTS),
        (rows(3), IDS, WEIGHTS.int()),
        (rows(3), torch.tensor(1), WEIGHTS),
    ],
    ids=[
        "float64",
        "complex",
        "no dimensions",
        "float ids",
        "bool ids",
        "complex ids",
        "int weights",
        "scalar ids",
    ],
)
def test_the_python_client_refuses_what_it_cannot_send(client, hidden, ids, weights) -> None:
    with pytest.raises(InvalidRequestError, match="expected"):
        client.forward(hidden, MOE, expert_ids=ids, expert_weights=weights)


@pytest.mark.parametrize("value", [1 << 32, -(1 << 32) + 3, (1 << 63) - 1])
def test_an_id_beyond_int32_is_not_wrapped_into_range(client, value) -> None:
    with pytest.raises(InvalidRequestError, match="expected 0 to 15"):
        client.forward(
            rows(1), MOE, expert_ids=torch.tensor([[value]]), expert_weights=torch.ones(1, 1)
        )


# What passes.


def test_rows_with_nan_pass_on_request_and_disturb_no_other_row(mesh, client) -> None:
    hidden = put(put(rows(6), (1, 5), NAN), (4, 0), INF)
    clean = [0, 2, 3, 5]

    answer = client.forward(hidden, MOE, non_finite="pass")

    torch.testing.assert_close(answer[clean], truth(mesh, hidden[clean]), **CLOSE)
    assert not torch.isfinite(answer[[1, 4]]).all(1).any()


def test_passed_nan_does_not_touch_requests_merged_into_the_same_batch(mesh) -> None:
    dirty, clean = put(rows(2), (0, 0), NAN), rows(2, seed=1)
    with RawStreamOf(mesh) as stream:
        with devices_held(mesh):
            request = forward(MOE, dirty, 2)
            request.forward.non_finite_policy = tensor_pb2.NON_FINITE_POLICY_PASS
            # Two batches are under way before the first answers: the third frame waits there.
            stream.send(forward(MOE, clean, 1), request, forward(MOE, clean, 3))
            wait_until(lambda: admission(mesh.routers[0]).frames == 3, 5.0, "in flight")
        answers = {message.frame_id: message for message in (stream.receive() for _ in range(3))}

    for frame_id in (1, 3):
        got = floats(answers[frame_id].forward.hidden_states)
        torch.testing.assert_close(got, truth(mesh, clean), **CLOSE)
    got = floats(answers[2].forward.hidden_states)
    torch.testing.assert_close(got[1:], truth(mesh, dirty[1:]), **CLOSE)


def test_weights_with_nan_pass_on_request_and_disturb_no_other_row(mesh, client) -> None:
    weights = put(WEIGHTS, (1, 1), NAN)

    answer = client.forward(rows(3), MOE, expert_ids=IDS, expert_weights=weights, non_finite="pass")

    wanted = client.forward(rows(3), MOE, expert_ids=IDS, expert_weights=WEIGHTS)
    torch.testing.assert_close(answer[[0, 2]], wanted[[0, 2]], **CLOSE)
    assert answer[1].isnan().all()


@pytest.mark.parametrize("layer", [DENSE, MOE])
@pytest.mark.parametrize("gated", [False, True], ids=["router gates", "caller gates"])
def test_an_empty_batch_is_answered_empty(client, layer, gated) -> None:
    choice = {}
    if gated and layer == MOE:
        choice = {
            "expert_ids": torch.empty(0, 2, dtype=torch.int32),
            "expert_weights": torch.empty(0, 2),
        }

    answer = client.forward(torch.empty(0, H, dtype=torch.bfloat16), layer, **choice)

    assert (answer.shape, answer.dtype) == ((0, H), torch.bfloat16)


def test_an_empty_batch_without_any_bytes_is_answered_to_generated_clients(router) -> None:
    request = router_pb2.ForwardRequest(layer=MOE, hidden_states=proto(torch.empty(0, H)))

    answer = router.Forward(request, timeout=10.0)

    assert list(answer.hidden_states.shape) == [0, H]
    assert answer.hidden_states.data == b""


def test_a_row_whose_ids_are_all_none_is_answered_with_zeros(client) -> None:
    none = ids_of(-1, -1, -1)

    answer = client.forward(rows(3), MOE, expert_ids=none, expert_weights=WEIGHTS)

    assert torch.equal(answer, torch.zeros(3, H))


# Sizes.


class RawStreamOf(RawStream):
    """A raw ForwardStream with a channel of its own."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._channel = grpc.insecure_channel(mesh.address)
        super().__init__(router_pb2_grpc.RouterServiceStub(self._channel).ForwardStream)

    def __exit__(self, *what: object) -> None:
        super().__exit__(*what)
        self._channel.close()


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


# Between router and expert server.


def execute(
    mesh: LocalMesh, experts: list[int], epoch: int | None = None, **changes: Any
) -> expert_pb2.ExecuteRequest:
    """One row for these experts, planned with the newest placement."""
    body: dict[str, Any] = {
        "layer": MOE,
        "hidden_states": proto(rows(1)),
        "expert_ids": proto(torch.tensor([experts], dtype=torch.int32)),
        "expert_weights": proto(torch.ones(1, len(experts))),
        "epoch": mesh.routers[0].router.snapshot.slots.epoch if epoch is None else epoch,
    }
    return expert_pb2.ExecuteRequest(**{**body, **changes})


def test_a_stale_epoch_is_refused_by_the_expert_server(mesh, client, shard) -> None:
    client.forward(rows(8), MOE)  # so that the router reports its epoch
    wait_until(lambda: mesh.servers[0].oldest_epoch > 0, 10.0, "told which epochs are in use")

    error = failure(lambda: shard.Execute(execute(mesh, [0], epoch=0), timeout=10.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error) == ("STALE_EPOCH", [], None)
    assert "take the newest placement and plan again" in error.details()
    assert len(shard.Execute(execute(mesh, [0]), timeout=10.0).hidden_states.data) == 4 * H


def test_an_expert_that_is_not_held_is_refused_by_name(mesh, shard) -> None:
    held = mesh.servers[0].shard.held(MOE)
    there = next(expert for expert in range(E) if not held[expert])

    error = failure(lambda: shard.Execute(execute(mesh, [there]), timeout=10.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "SLOT_NOT_HELD"
    assert str(there) in error.details()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_states": proto(torch.zeros(1, 63))},
        {"hidden_states": proto(torch.zeros(1, H, dtype=torch.int32))},
        {"expert_ids": proto(torch.zeros(1, 1, dtype=torch.int64))},
        {"expert_ids": proto(torch.zeros(2, 1, dtype=torch.int32))},
        {"expert_ids": proto(torch.tensor([[-2]], dtype=torch.int32))},
        {"expert_weights": proto(torch.ones(1, 2))},
        {"expert_weights": None},
        {"expert_ids": None},
        {"hidden_states": None},
    ],
    ids=[
        "width",
        "dtype",
        "int64 ids",
        "rows of ids",
        "low id",
        "weights",
        "no weights",
        "no ids",
        "no hidden states",
    ],
)
def test_an_expert_server_checks_what_routers_send(mesh, shard, changes) -> None:
    error = failure(lambda: shard.Execute(execute(mesh, [0], **changes), timeout=10.0))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)[0] == "INVALID_REQUEST"


def test_a_server_that_is_not_ready_says_so_and_when_to_come_back(mesh, shard, monkeypatch) -> None:
    monkeypatch.setattr(mesh.servers[0], "state", "draining")

    error = failure(lambda: shard.Execute(execute(mesh, [0]), timeout=10.0))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details(error) == ("UNAVAILABLE", [], 1.0)
    monkeypatch.undo()
    mesh.wait()


def test_a_cluster_that_cannot_be_reached_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        expertmesh.connect("127.0.0.1:1", timeout=0.2)


@pytest.mark.parametrize("address", ["", "nowhere", "host:port", ":1", "a:1,b"])
def test_an_address_that_is_none_is_refused(address) -> None:
    with pytest.raises(InvalidRequestError, match="expected host:port"):
        expertmesh.connect(address)


def test_a_bug_in_a_server_is_an_internal_error_with_an_incident_id(
    mesh, client, monkeypatch, caplog
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise ZeroDivisionError("the secret of /etc/shadow")

    for server in mesh.servers:
        monkeypatch.setattr(server._backend, "compute", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError) as caught:
        client.forward(rows(2), MOE)

    incident = caught.value.message.split("incident ")[1].split(":")[0]
    assert incident in caplog.text
    assert "secret" in caplog.text
    assert "secret" not in caught.value.message


def test_a_cancelled_call_is_told_so_and_leaves_nothing(mesh, router) -> None:
    request = router_pb2.ForwardRequest(layer=MOE, hidden_states=proto(rows(2)))

    with devices_held(mesh):
        call = router.Forward.future(request)
        wait_until(lambda: admission(mesh.routers[0]).frames == 1, 5.0, "in flight")
        call.cancel()
        wait_until_idle(mesh)

    assert call.code() is grpc.StatusCode.CANCELLED


# Fleets that do not belong together.


def announcement(mesh: LocalMesh, **changes: Any) -> control_pb2.AnnounceServerRequest:
    server = mesh.servers[0]
    return control_pb2.AnnounceServerRequest(
        **{
            "server": server.status(),
            "protocol_version": expertmesh.model.PROTOCOL_VERSION,
            "checkpoint_digest": server._checkpoint.digest,
            "started_at_ns": 1,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint_digest": "f" * 64}, "start every server from the same files"),
        ({"checkpoint_digest": ""}, "names no checkpoint digest"),
        ({"protocol_version": 99}, "run the same release of expertmesh everywhere"),
    ],
    ids=["checkpoint", "no checkpoint", "protocol"],
)
def test_the_controller_refuses_a_server_of_another_fleet(mesh, control, changes, says) -> None:
    error = failure(lambda: control.AnnounceServer(announcement(mesh, **changes), timeout=5.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "FLEET_MISMATCH"
    assert says in error.details()


def test_the_controller_refuses_a_router_of_another_fleet(control) -> None:
    request = control_pb2.WatchClusterRequest(
        router_id="other", incarnation="1", protocol_version=1, checkpoint_digest="f" * 64
    )

    error = failure(lambda: list(control.WatchCluster(request, timeout=5.0)))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "FLEET_MISMATCH"


def test_a_server_of_another_checkpoint_ends_itself_with_the_reason(mesh, tmp_path) -> None:
    make_checkpoint("deepseek_v3", tmp_path, seed=1)
    stranger = loop.run(
        meshes.start_server_at(
            tmp_path, mesh.controller.address, "stranger", 0, 2, backend="reference"
        )
    )

    async def refusal() -> MeshError:
        error: MeshError = await stranger.failed
        await stranger.stop()
        return error

    error = loop.run(refusal())
    assert type(error) is MismatchError
    assert "from the same files" in error.message


def test_the_python_client_refuses_a_router_of_another_protocol(mesh, monkeypatch) -> None:
    monkeypatch.setattr(router_service.servicer, "PROTOCOL_VERSION", 2)

    with pytest.raises(MismatchError, match="install the same release"):
        expertmesh.connect(mesh.address)


def test_an_older_incarnation_of_a_server_is_told_that_it_is_superseded(mesh, control) -> None:
    error = failure(lambda: control.AnnounceServer(announcement(mesh), timeout=5.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "SUPERSEDED"
    assert "give each server an id of its own" in error.details()


def test_a_balance_mode_that_is_none_is_refused(control) -> None:
    request = control_pb2.SetBalanceModeRequest(mode="wild")

    error = failure(lambda: control.SetBalanceMode(request, timeout=5.0))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error) == ("INVALID_REQUEST", ["mode"], None)


def test_totals_that_shrink_are_refused_and_taken_back_by_nobody(mesh, control) -> None:
    def report(sequence: int, counts: list[int]) -> control_pb2.ReportAssignmentsRequest:
        return control_pb2.ReportAssignmentsRequest(
            source="shrinking",
            incarnation="1",
            sequence=sequence,
            layers=[router_pb2.LayerLoad(layer=99, counts=counts, top_k=1)],
        )

    control.ReportAssignments(report(1, [2, 5]), timeout=5.0)

    error = failure(lambda: control.ReportAssignments(report(2, [3, 4]), timeout=5.0))
    load = control.GetClusterLoad(control_pb2.GetClusterLoadRequest(), timeout=5.0)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error) == ("INVALID_REQUEST", ["layers"], None)
    assert [list(entry.counts) for entry in load.layers if entry.layer == 99] == [[2, 5]]


def test_a_router_whose_gate_cannot_choose_is_refused(mesh, control) -> None:
    gate = control_pb2.LayerGate(layer=MOE, score="sigmoid", top_k=5, n_group=1, topk_group=1,
                                 group_score="max", trained_bias=[0.0, 0.0])  # fmt: skip
    request = control_pb2.WatchClusterRequest(
        router_id="odd",
        incarnation="1",
        protocol_version=1,
        checkpoint_digest=open_model(mesh.path).digest,
        gates=[gate],
    )

    error = failure(lambda: list(control.WatchCluster(request, timeout=5.0)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error) == ("INVALID_REQUEST", ["gates"], None)


_MIGRATION = Path(__file__).with_name("test_migration.py")  # has the rows of moving experts
_SCALE = Path(__file__).with_name("test_scale.py")  # has those of servers that come and go
_SHARED = Path(__file__).with_name("test_shared_memory.py")  # has those of shared memory


def test_every_test_that_the_table_names_is_there() -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    table = page[page.index("| reason | gRPC status |") :].split("\n\n")[0].splitlines()[2:]
    named = [re.findall(r"`(\[[\w-]+\]|test_\w+)`", row.split("|")[6]) for row in table]

    assert all(named), "a row names no test"
    names = {name for row in named for name in row}
    assert {name for name in names if name.startswith("[")} == {f"[{name}]" for name in REFUSED}
    others = _MIGRATION.read_text() + _SCALE.read_text() + _SHARED.read_text()
    there = set(globals()) | set(re.findall(r"^def (test_\w+)", others, re.M))
    assert {name for name in names if name.startswith("test_")} <= there


def test_the_hand_written_client_sends_what_this_file_sends_by_generated_code() -> None:
    ours = messages.ForwardRequest(
        layer=MOE, hidden_states=rows(3), expert_ids=IDS, expert_weights=WEIGHTS
    )
    good = Bad(MeshError, "", "", ids=IDS, weights=WEIGHTS)

    assert messages.encode_whole(messages.FORWARD_REQUEST, ours) == good.body().SerializeToString()
