"""What a router refuses at its edge, and what it lets pass. No network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertmesh.codec.messages import ForwardRequest
from expertmesh.errors import InvalidRequestError, NonFiniteError, UnknownLayerError
from expertmesh.model import GateSpec, LayerSpec, ModelSpec
from router_service.validate import check

H = 8
MOE = LayerSpec(
    index=3,
    num_experts=6,
    intermediate_size=4,
    shared_intermediate_size=4,
    gate=GateSpec(score="softmax", top_k=2),
)
DENSE = LayerSpec(index=0, num_experts=0, intermediate_size=0, shared_intermediate_size=16)
SPEC = ModelSpec(model_type="deepseek_v3", hidden_size=H, layers=(DENSE, MOE), dtype=torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def request(rows: int = 2, **fields: Any) -> ForwardRequest:
    return ForwardRequest(**{"layer": 3, "hidden_states": torch.zeros(rows, H), **fields})


def gated(ids: list[list[int]], **fields: Any) -> ForwardRequest:
    chosen = torch.tensor(ids, dtype=torch.int32).view(len(ids), -1)
    weights = torch.full(chosen.shape, 0.5)
    return request(len(ids), **{"expert_ids": chosen, "expert_weights": weights, **fields})


def refusal(bad: ForwardRequest, layer: LayerSpec | None = MOE) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check(bad, SPEC, layer)
    return caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_hidden_states_of_a_served_dtype_pass(dtype) -> None:
    assert check(request(hidden_states=torch.ones(3, H, dtype=dtype)), SPEC, MOE) is MOE


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.int64], ids=str)
def test_hidden_states_of_another_dtype_are_refused(dtype) -> None:
    error = refusal(request(hidden_states=torch.ones(3, H).to(dtype)))

    assert error.field == "hidden_states.data_type"
    assert str(dtype).removeprefix("torch.") in error.message


@pytest.mark.parametrize("shape", [(), (H,), (2, 3, H), (0,), (2, H + 1), (2, 0), (0, 0)], ids=str)
def test_hidden_states_of_another_shape_are_refused(shape) -> None:
    error = refusal(request(hidden_states=torch.zeros(shape)))

    assert type(error) is InvalidRequestError
    assert error.field == "hidden_states.shape"


def test_an_unknown_layer_is_refused_with_the_layers_that_there_are() -> None:
    error = refusal(request(layer=1), layer=None)

    assert type(error) is UnknownLayerError
    assert error.message.startswith("layer 1 is not a feed-forward layer of this deepseek_v3 model")
    assert "which has 0, 3" in error.message


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_element_that_is_not_finite_is_found(value, dtype) -> None:
    hidden = torch.ones(50, H, dtype=dtype)
    hidden[49, 7] = value

    error = refusal(request(hidden_states=hidden))

    assert type(error) is NonFiniteError
    assert "row 49, column 7" in error.message


def test_infinities_of_both_signs_do_not_cancel() -> None:
    hidden = torch.zeros(1, H)
    hidden[0, 2], hidden[0, 3] = INF, -INF

    assert "row 0, column 2" in refusal(request(hidden_states=hidden)).message


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, 3.4e38), (torch.float16, 65504.0), (torch.bfloat16, 3.38e38)],
    ids=str,
)
def test_finite_values_pass_even_where_their_sum_overflows(dtype, largest) -> None:
    check(request(hidden_states=torch.full((4, H), largest, dtype=dtype)), SPEC, MOE)


def test_values_that_are_not_finite_pass_on_request() -> None:
    bad = gated([[0, 1]], pass_non_finite=True)
    bad.hidden_states = torch.full((1, H), NAN)
    bad.expert_weights = torch.full((1, 2), INF)

    check(bad, SPEC, MOE)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite_are_refused(value) -> None:
    error = refusal(gated([[0, 1]], expert_weights=torch.tensor([[0.5, value]])))

    assert type(error) is NonFiniteError
    assert error.field == "expert_weights"


@pytest.mark.parametrize(
    "ids",
    [[[0, 5]], [[5, 0]], [[-1, 0]], [[-1, -1]], [[3]], [[0, 1, 2, 3, 4, 5]], [[0, 1], [1, 0]]],
    ids=str,
)
def test_ids_in_range_and_once_a_row_pass(ids) -> None:
    check(gated(ids), SPEC, MOE)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[0, 6]], "hold 6, expected 0 to 5, or -1 for none"),
        ([[0, -2]], "hold -2, expected"),
        ([[0, (1 << 31) - 1]], "hold 2147483647"),
        ([[0, -(1 << 31)]], "hold -2147483648"),
        ([[1, 1]], "name expert 1 twice in row 0"),
        ([[0, 1, 2], [4, -1, 4]], "name expert 4 twice in row 1"),
        ([[0, 1, 0, 1]], "name expert 0 twice in row 0"),
    ],
)
def test_ids_out_of_range_or_doubled_are_refused_by_value(ids, says) -> None:
    error = refusal(gated(ids))

    assert says in error.message
    assert error.field == "expert_ids"


def test_no_id_twice_may_be_none() -> None:
    check(gated([[-1, -1, 2]]), SPEC, MOE)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"expert_ids": None}, "expert_ids"),
        ({"expert_weights": None}, "expert_weights"),
        ({"expert_ids": torch.zeros(1, 2, dtype=torch.int64)}, "expert_ids.data_type"),
        ({"expert_ids": torch.zeros(1, 2)}, "expert_ids.data_type"),
        ({"expert_weights": torch.zeros(1, 2).half()}, "expert_weights.data_type"),
        ({"expert_ids": torch.zeros(2, dtype=torch.int32)}, "expert_ids.shape"),
        ({"expert_ids": torch.zeros(2, 2, dtype=torch.int32)}, "expert_ids.shape"),
        ({"expert_ids": torch.zeros(1, 0, dtype=torch.int32)}, "expert_ids.shape"),
        ({"expert_weights": torch.zeros(1, 3)}, "expert_weights.shape"),
        ({"expert_weights": torch.zeros(2)}, "expert_weights.shape"),
    ],
)
def test_ids_and_weights_that_do_not_fit_are_refused_by_field(fields, field) -> None:
    assert refusal(gated([[0, 1]], **fields)).field == field


def test_ids_for_a_dense_layer_are_refused() -> None:
    error = refusal(gated([[0, 1]], layer=0), layer=DENSE)

    assert "layer 0 is dense" in error.message


@pytest.mark.parametrize("layer", [DENSE, MOE], ids=["dense", "moe"])
def test_a_request_without_rows_passes(layer) -> None:
    check(request(0), SPEC, layer)


def test_a_gated_request_without_rows_passes() -> None:
    bad = request(
        0, expert_ids=torch.empty(0, 2, dtype=torch.int32), expert_weights=torch.empty(0, 2)
    )

    check(bad, SPEC, MOE)


@pytest.mark.parametrize(
    "bad",
    [
        request(hidden_states=torch.zeros(2, H + 1)),
        request(hidden_states=torch.full((2, H), NAN)),
        gated([[0, 6]]),
        gated([[0, 0]]),
    ],
    ids=["width", "nan", "range", "double"],
)
def test_every_refusal_says_what_was_sent_and_what_was_expected_or_to_do(bad) -> None:
    message = refusal(bad).message

    assert any(character.isdigit() for character in message)
    assert "expected" in message or ":" in message
