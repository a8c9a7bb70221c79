"""The gate in one launch, against `expertmesh.gating.select`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.gating import Routing, check_gate, select
from expertmesh.model import GateSpec
from router_service.kernels.gate_topk import gate_topk
from tests.gates import V3

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]

QWEN3 = GateSpec(score="softmax", top_k=8, renormalize=True)
V2 = GateSpec(score="softmax", top_k=3, n_group=4, topk_group=2, group_score="max", scale=16.0)
SPECS = {"qwen3": QWEN3, "deepseek-v2": V2, "deepseek-v3": V3}


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _logits(rows: int, experts: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _bias(experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(experts, generator=torch.Generator().manual_seed(seed + 1)) / 4


def _gate(logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None = None) -> Routing:
    bias = None if bias_E is None else bias_E.to(DEVICE)
    return Routing(*(tensor.cpu() for tensor in gate_topk(logits_TE.to(DEVICE), spec, bias)))


def _assert_equal(actual: Routing, expected: Routing) -> None:
    """The order within a row is free."""
    assert actual.expert_ids.dtype == torch.int32
    ids, order = actual.expert_ids.sort(dim=1)
    expected_ids, expected_order = expected.expert_ids.sort(dim=1)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(
        actual.weights.gather(1, order),
        expected.weights.gather(1, expected_order),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("rows", [0, 1, 63, 100])
@pytest.mark.parametrize("name", SPECS)
def test_ids_and_weights_equal_the_pure_gates(
    name: str, rows: int, biased: bool, dtype: torch.dtype
) -> None:
    spec = SPECS[name]
    logits = _logits(rows, 32, dtype)
    bias = _bias(32) if biased else None

    _assert_equal(_gate(logits, spec, bias), select(logits, spec, bias))


# The same examples each time: the last bit of a score is the platform's, and where it decides
# between two choices the sets may differ.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_gate_equals_the_pure_one(data: st.DataObject) -> None:
    """Groups and sizes that are no powers of two, and logits with many ties."""
    groups = data.draw(st.integers(1, 6), "groups")
    size = data.draw(st.integers(1, 9), "size")
    kept = data.draw(st.integers(1, groups), "kept")
    spec = GateSpec(
        score=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        top_k=data.draw(st.integers(1, min(8, kept * size)), "top_k"),
        n_group=groups,
        topk_group=kept,
        group_score=data.draw(st.sampled_from(["max", "top2_sum"])) if size > 1 else "max",
        renormalize=data.draw(st.booleans()),
        scale=data.draw(st.sampled_from([1.0, 2.5])),
    )
    check_gate(spec, groups * size)
    rows, seed = data.draw(st.integers(1, 20), "rows"), data.draw(st.integers(0, 9999), "seed")
    # Whole numbers, so that equal logits are common; no negative ones, since sigmoid(x) and
    # sigmoid(-x) add up to sigmoid(0) twice, but for the last bit.
    logits = (2 * _logits(rows, groups * size, torch.float32, seed)).abs().round()
    bias = _bias(groups * size, seed) if data.draw(st.booleans(), "biased") else None

    _assert_equal(_gate(logits, spec, bias), select(logits, spec, bias))


@pytest.mark.parametrize("name", SPECS)
def test_equal_logits_choose_the_lowest_ids(name: str) -> None:
    spec = SPECS[name]
    ids, weights = _gate(torch.zeros(3, 64), spec)

    assert ids.tolist() == [list(range(spec.top_k))] * 3
    assert torch.equal(weights, weights[:1, :1].expand_as(weights))


def test_masked_groups_lose_to_negative_choices() -> None:
    """-inf, not 0: a bias may push every choice of the groups that stay below zero."""
    spec = GateSpec(score="sigmoid", top_k=2, n_group=2, topk_group=1, group_score="top2_sum")
    bias = torch.tensor([-3.0, -3.0, -2.0, -2.0])

    ids, _ = _gate(torch.zeros(1, 4), spec, bias)

    assert sorted(ids[0].tolist()) == [2, 3]


def test_a_bias_chooses_and_does_not_weigh() -> None:
    spec = GateSpec(score="sigmoid", top_k=1)

    ids, weights = _gate(torch.zeros(1, 3), spec, torch.tensor([0.0, 0.5, 0.25]))

    assert ids.tolist() == [[1]]
    assert weights.tolist() == [[0.5]]


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's own maximum
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("poisoned", [slice(None), slice(5, 6)], ids=["whole", "one"])
def test_a_row_of_nan_gets_distinct_ids_and_leaves_others_alone(name: str, poisoned: slice) -> None:
    spec, logits = SPECS[name], _logits(9, 64, torch.float32)
    expected = select(logits, spec)
    logits[4, poisoned] = torch.nan

    ids, weights = _gate(logits, spec)

    others = [row for row in range(9) if row != 4]
    _assert_equal(
        Routing(ids[others], weights[others]),
        Routing(expected.expert_ids[others], expected.weights[others]),
    )
    assert len(set(ids[4].tolist())) == spec.top_k
    assert 0 <= ids[4].min() <= ids[4].max() < 64


def test_weights_are_rounded_where_the_family_does() -> None:
    spec = GateSpec(score="softmax", top_k=2, round_weights=True)
    logits = _logits(20, 12, torch.float16)

    routing = _gate(logits, spec)

    assert torch.equal(routing.weights, routing.weights.half().float())
    assert not torch.equal(_gate(logits.float(), spec).weights, routing.weights)
    expected = select(logits, spec)
    assert torch.equal(
        routing.expert_ids.sort(dim=1).values, expected.expert_ids.sort(dim=1).values
    )
    torch.testing.assert_close(
        routing.weights.sort(dim=1).values, expected.weights.sort(dim=1).values, rtol=1e-3, atol=0
    )


def test_rows_may_be_part_of_a_larger_tensor() -> None:
    logits = _logits(7, 80, torch.float32)[:, 8:72]

    _assert_equal(_gate(logits, V3, _bias(64)), select(logits, V3, _bias(64)))


def test_the_same_logits_give_the_same_bits() -> None:
    logits = _logits(50, 64, torch.float32)
    first, second = _gate(logits, V3, _bias(64)), _gate(logits, V3, _bias(64))

    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize(
    ("logits", "bias", "message"),
    [
        (torch.zeros(64), None, r"logits are torch\.float32 \(64,\)"),
        (torch.zeros(2, 64, dtype=torch.int32), None, r"logits are torch\.int32 \(2, 64\)"),
        (torch.zeros(64, 64).T, None, "strides"),
        (torch.zeros(2, 6), None, r"logits \(2, 6\) with top_k 8 and n_group 8"),
        (torch.zeros(2, 60), None, r"logits \(2, 60\) with top_k 8 and n_group 8"),
        (torch.zeros(2, 64), torch.zeros(63), r"bias is torch\.float32 \(63,\)"),
        (torch.zeros(2, 64), torch.zeros(64).half(), r"bias is torch\.float16 \(64,\)"),
    ],
)
def test_a_wrong_input_is_refused(
    logits: torch.Tensor, bias: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gate_topk(logits, V3, bias)
