"""Tensors that cannot be, row by row of the table in docs/protocol.md; and odd ones that pass."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from expertmesh.codec import messages
from expertmesh.errors import (
    InvalidRequestError,
    MeshError,
    MessageTooLargeError,
    NonFiniteError,
    UnknownLayerError,
)
from expertmesh.v1 import router_pb2, tensor_pb2
from tests.bad_input import (
    DENSE,
    IDS,
    INF,
    MOE,
    NAN,
    WEIGHTS,
    RawStreamOf,
    failure,
    ids_of,
    put,
    truth,
)
from tests.bad_input import channel as channel
from tests.bad_input import client as client
from tests.bad_input import mesh as mesh
from tests.bad_input import router as router
from tests.bad_input import sessions as sessions
from tests.bad_input import stream as stream
from tests.bad_input import (
    the_cluster_serves_on_and_nothing_leaks as the_cluster_serves_on_and_nothing_leaks,
)
from tests.mesh import wait_until
from tests.rows import CLOSE, H, rows
from tests.wire import admission, details, devices_held, floats, forward, proto

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


#: Have the other rows of the table.
OTHERS = (
    "test_bad_calls.py",
    "test_bad_peers.py",
    "test_migration.py",  # of moving experts
    "test_scale.py",  # of servers that come and go
    "test_shared_memory_blocks.py",
)


def test_every_test_that_the_table_names_is_there() -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    table = page[page.index("| reason | gRPC status |") :].split("\n\n")[0].splitlines()[2:]
    named = [re.findall(r"`(\[[\w-]+\]|test_\w+)`", row.split("|")[6]) for row in table]

    assert all(named), "a row names no test"
    names = {name for row in named for name in row}
    assert {name for name in names if name.startswith("[")} == {f"[{name}]" for name in REFUSED}
    others = "".join(Path(__file__).with_name(name).read_text() for name in OTHERS)
    there = set(globals()) | set(re.findall(r"^def (test_\w+)", others, re.M))
    assert {name for name in names if name.startswith("test_")} <= there


def test_the_hand_written_client_sends_what_this_file_sends_by_generated_code() -> None:
    ours = messages.ForwardRequest(
        layer=MOE, hidden_states=rows(3), expert_ids=IDS, expert_weights=WEIGHTS
    )
    good = Bad(MeshError, "", "", ids=IDS, weights=WEIGHTS)

    assert messages.encode_whole(messages.FORWARD_REQUEST, ours) == good.body().SerializeToString()
