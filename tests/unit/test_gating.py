"""How experts are chosen and weighed: written-out cases, and properties over random gates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from expertmesh.errors import ConfigError
from expertmesh.gating import (
    changed_picks,
    check_gate,
    choice_mask,
    choose,
    in_groups,
    logits,
    route,
    scores,
    select,
    shared_weights,
)
from expertmesh.model import GateSpec, GateWeights
from tests.gates import V3

SOFTMAX = GateSpec(score="softmax", top_k=2)
SIGMOID = GateSpec(score="sigmoid", top_k=2)
GROUPED = GateSpec(score="sigmoid", top_k=2, n_group=2, topk_group=1, group_score="top2_sum")


def chosen(
    logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None = None
) -> list[list[int]]:
    """The set of ids of each row, sorted."""
    rows: list[list[int]] = select(logits_TE, spec, bias_E).expert_ids.sort(dim=-1).values.tolist()
    return rows


def weight_of(
    logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
) -> list[dict[int, float]]:
    """Expert id → weight, for each row."""
    ids, weights = select(logits_TE, spec, bias_E)
    return [
        dict(zip(*row, strict=True)) for row in zip(ids.tolist(), weights.tolist(), strict=True)
    ]


def test_the_highest_scores_are_chosen_with_their_softmax_as_weight() -> None:
    logits_TE = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()

    ids, weights = select(logits_TE, SOFTMAX)

    assert ids.dtype == torch.int32
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.25]]))


def test_renormalised_weights_add_up_to_the_scale() -> None:
    logits_TE = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()

    _, weights = select(logits_TE, replace(SOFTMAX, renormalize=True, scale=3.0))

    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0]]))


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("rows", [1, 300], ids=["few rows", "many rows"])
def test_weights_are_divided_by_their_sum_and_the_familys_epsilon_then_scaled(
    rows: int, scale: float
) -> None:
    spec = replace(SIGMOID, renormalize=True, renormalize_eps=0.5, scale=scale)

    routing = select(torch.zeros(rows, 4), spec)

    # Two scores of 0.5: each 0.5 / (1 + 0.5).
    assert routing.weights.tolist() == [[pytest.approx(scale / 3)] * 2] * rows
    assert routing.weights.dtype == torch.float32
    assert routing.expert_ids.dtype == torch.int32


@pytest.mark.parametrize("rows", [1, 300], ids=["few rows", "many rows"])
def test_scores_are_float32_whatever_the_logits_are(rows: int) -> None:
    logits_TE = torch.tensor([[0.3, 0.2, 0.1, 0.0]] * rows, dtype=torch.bfloat16)

    sigmoid, softmax = scores(logits_TE, SIGMOID), scores(logits_TE, SOFTMAX)

    assert (sigmoid.dtype, softmax.dtype) == (torch.float32, torch.float32)
    assert torch.equal(sigmoid, logits_TE.float().sigmoid())
    assert torch.equal(softmax, logits_TE.float().softmax(-1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_flow_through_the_weights_of_few_rows(score: Any) -> None:
    logits_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)

    select(logits_TE, replace(SOFTMAX, score=score)).weights.sum().backward()

    assert logits_TE.grad is not None
    assert bool((logits_TE.grad[0, :2] > 0).all())


def test_a_choice_is_also_told_as_a_mask_and_compared_with_another() -> None:
    scores_TE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    bias_E = torch.tensor([0.0, 0.0, 0.0, 0.25])

    own, biased = choice_mask(scores_TE, SIGMOID), choice_mask(scores_TE, SIGMOID, bias_E)
    ids_TK = choose(scores_TE, SIGMOID, bias_E)

    assert own.dtype == torch.bool
    assert own.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert biased.int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 1]]
    assert ids_TK.sort(1).values.tolist() == [[0, 3], [2, 3]]
    assert ids_TK.dtype == torch.int64
    assert changed_picks(ids_TK.int(), own) == 1
    assert changed_picks(choose(scores_TE, SIGMOID).int(), own) == 0


def test_groups_that_are_not_kept_cannot_be_chosen_from() -> None:
    choice_TE = torch.tensor([[0.9, 0.0, 0.6, 0.5]])

    assert in_groups(choice_TE, GROUPED).tolist() == [[-math.inf, -math.inf, *choice_TE[0, 2:]]]
    assert in_groups(choice_TE, replace(GROUPED, topk_group=2)) is choice_TE


def test_bias_decides_who_is_chosen_and_never_the_weight() -> None:
    logits_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias_E = torch.tensor([-1.0, 0.0, 0.0, 1.0])

    found = weight_of(logits_TE, SIGMOID, bias_E)[0]

    assert found == {
        3: pytest.approx(1 / (1 + math.exp(1.0))),
        1: pytest.approx(1 / (1 + math.exp(-1.0))),
    }


def test_the_group_with_the_best_pair_wins_over_the_group_with_the_best_expert() -> None:
    logits_TE = torch.tensor([[9.0, -9.0, -9.0, 1.0, 1.5, -9.0]])

    assert chosen(logits_TE, GROUPED) == [[3, 4]]
    assert chosen(logits_TE, replace(GROUPED, group_score="max")) == [[0, 1]]


def test_an_expert_of_a_dropped_group_does_not_beat_a_negative_biased_score() -> None:
    logits_TE = torch.tensor([[-2.0, -3.0, -4.0, -5.0]])
    bias_E = torch.tensor([-1.0, -1.0, -1.0, -1.0])

    assert chosen(logits_TE, GROUPED, bias_E) == [[0, 1]]


@pytest.mark.parametrize("num_tokens", [1, 300], ids=["few rows", "many rows"])
@pytest.mark.parametrize("experts", [16, 256])
def test_ties_at_the_boundary_go_to_the_lower_expert_and_the_lower_group(
    experts: int, num_tokens: int
) -> None:
    """Of many experts a sort that need not be stable is not."""
    spec = replace(GROUPED, n_group=4, topk_group=2, top_k=3)

    found = chosen(torch.zeros(num_tokens, experts), spec)

    assert found == [[0, 1, 2]] * num_tokens


def test_a_tie_above_the_boundary_changes_nothing() -> None:
    logits_TE = torch.tensor([[0.0, 5.0, 5.0, 1.0]])

    assert chosen(logits_TE, SIGMOID) == [[1, 2]]


@pytest.mark.parametrize("spec", [V3, replace(SOFTMAX, top_k=8)], ids=["sigmoid", "softmax"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("rows", [9, 300])
def test_a_non_finite_row_gives_distinct_ids_and_leaves_other_rows_alone(
    rows: int, spec: GateSpec, bad: float
) -> None:
    logits_TE = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    clean = select(logits_TE, spec)
    spoiled_TE = logits_TE.clone()
    spoiled_TE[7] = bad
    spoiled_TE[8, ::3] = bad

    ids, weights = select(spoiled_TE, spec)

    assert all(len(set(row)) == 8 and 0 <= min(row) <= max(row) < 64 for row in ids.tolist())
    rest = torch.ones(rows, dtype=torch.bool)
    rest[7:9] = False
    assert torch.equal(ids[rest], clean.expert_ids[rest])
    assert torch.equal(weights[rest], clean.weights[rest])


def test_no_tokens_give_no_rows() -> None:
    ids, weights = select(torch.empty(0, 256), V3, torch.zeros(256))

    assert ids.shape == weights.shape == (0, 8)


@pytest.mark.parametrize("rows", [3, 300], ids=["few rows", "many rows"])
def test_every_expert_can_be_chosen(rows: int) -> None:
    assert chosen(torch.randn(rows, 4), replace(SOFTMAX, top_k=4)) == [[0, 1, 2, 3]] * rows


def test_few_rows_on_another_device_are_routed_there() -> None:
    routing = select(torch.zeros(2, 4, device="meta"), replace(SIGMOID, top_k=4))

    assert [each.device.type for each in routing] == ["meta", "meta"]
    assert [each.shape for each in routing] == [(2, 4), (2, 4)]


def test_a_row_is_routed_alike_alone_and_in_a_batch() -> None:
    logits_TE = torch.randn(1024, 256, generator=torch.Generator().manual_seed(2))
    bias_E = torch.randn(256, generator=torch.Generator().manual_seed(3))

    batch = weight_of(logits_TE, V3, bias_E)

    assert weight_of(logits_TE[5:6], V3, bias_E)[0] == pytest.approx(batch[5], abs=1e-6)


def test_weights_are_rounded_through_the_logits_dtype_where_the_family_does() -> None:
    logits_TE = torch.tensor([[0.3, 0.2, 0.1, 0.0]], dtype=torch.bfloat16)

    plain = select(logits_TE, SOFTMAX).weights
    rounded = select(logits_TE, replace(SOFTMAX, round_weights=True)).weights

    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, plain.bfloat16().float())
    assert not torch.equal(rounded, plain)


def test_logits_are_computed_in_float32_or_in_the_dtype_of_the_hidden_states() -> None:
    hidden_TH = torch.randn(3, 8, dtype=torch.bfloat16)
    gate = GateWeights(torch.randn(4, 8), torch.zeros(4), None)

    wide, narrow = (
        logits(hidden_TH, gate, replace(SIGMOID, logits_float32=True)),
        logits(hidden_TH, gate, SOFTMAX),
    )

    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(wide, hidden_TH.float() @ gate.weight.T)
    torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.1)


def test_route_selects_from_the_logits_of_the_gate() -> None:
    hidden_TH = torch.tensor([[1.0, 0.0]])
    gate = GateWeights(torch.tensor([[3.0, 0.0], [1.0, 9.0], [2.0, 0.0]]), torch.zeros(3), None)

    routing = route(hidden_TH, gate, SIGMOID, torch.tensor([-9.0, 0.0, 0.0]))

    assert sorted(routing.expert_ids[0].tolist()) == [1, 2]


def test_the_shared_weight_is_the_sigmoid_of_its_gate() -> None:
    gate = GateWeights(torch.zeros(2, 2), torch.zeros(2), torch.tensor([[1.0, -1.0]]))

    weights = shared_weights(torch.tensor([[2.0, 2.0], [1.0, 0.0]]), gate)

    expected = torch.tensor([0.5, 1 / (1 + math.exp(-1.0))])
    torch.testing.assert_close(weights, expected)
    assert shared_weights(torch.zeros(1, 2), gate._replace(shared_gate=None)) is None
    narrow = shared_weights(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16), gate)
    assert narrow is not None
    assert narrow.dtype == torch.float32
    assert narrow.tolist() == [expected[1].bfloat16().item()]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": "tanh"}, "score is 'tanh', expected softmax or sigmoid"),
        ({"group_score": "min"}, "group_score is 'min', expected max or top2_sum"),
        ({"top_k": 0}, "top_k is 0, expected 1 to 8"),
        ({"top_k": 9}, "top_k is 9, expected 1 to 8"),
        ({"n_group": 0}, "n_group is 0, expected at least 1"),
        ({"n_group": 3}, "n_group is 3, expected a divisor of 8"),
        ({"n_group": 4, "topk_group": 0}, "topk_group is 0, expected 1 to n_group=4"),
        ({"n_group": 4, "topk_group": 5}, "topk_group is 5, expected 1 to n_group=4"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "top_k is 3, expected 1 to 2"),
        (
            {"n_group": 8, "topk_group": 2, "group_score": "top2_sum"},
            "group_score is 'top2_sum' with groups of 1, expected groups of 2 or more",
        ),
        ({"scale": math.nan}, "scale is nan, expected a finite number"),
        ({"scale": math.inf}, "scale is inf, expected a finite number"),
        ({"renormalize_eps": -1.0}, "renormalize_eps is -1.0, expected 0 or more"),
        ({"renormalize_eps": math.inf}, "renormalize_eps is inf, expected 0 or more"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_gate_that_cannot_choose_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_gate(replace(SOFTMAX, **change), 8)

    assert refused.value.message == f"the gate cannot work: {says}"


@pytest.mark.parametrize(
    ("change", "experts"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 8}, 8),
        ({"n_group": 4, "topk_group": 2, "top_k": 4, "group_score": "top2_sum"}, 8),
        ({"n_group": 8, "topk_group": 2, "group_score": "max"}, 8),
        ({"n_group": 8, "topk_group": 8, "group_score": "top2_sum"}, 8),
        ({"renormalize_eps": 0.0}, 8),
        ({"score": "sigmoid", "scale": -2.5}, 8),
    ],
    ids=[
        "one expert",
        "every expert",
        "pairs",
        "of one, by its best",
        "all groups",
        "eps",
        "scale",
    ],
)
def test_a_gate_that_can_just_choose_is_taken(change: dict[str, Any], experts: int) -> None:
    check_gate(replace(SOFTMAX, **change), experts)


def test_a_layer_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="the layer has 0 experts, expected at least 1"):
        check_gate(SOFTMAX, 0)


@st.composite
def gates(draw: DrawFn) -> tuple[torch.Tensor, GateSpec, torch.Tensor]:
    """Logits, a spec and a bias. Few distinct values, so that ties are common."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    spec = GateSpec(
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        top_k=draw(st.integers(1, kept * size)),
        n_group=groups,
        topk_group=kept,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels, num_tokens = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 260]))
    shape = (num_tokens, groups * size)
    logits_TE = torch.randint(levels, shape, generator=generator).float()
    bias_E = torch.randint(-2, 3, shape[1:], generator=generator) / 4
    check_gate(spec, shape[1])
    return logits_TE, spec, bias_E


def choose_slowly(scores_E: list[float], spec: GateSpec) -> list[int]:
    """The definition: sort by (score, lower id first), groups before experts."""
    size = len(scores_E) // spec.n_group
    groups = [sorted(scores_E[g * size : (g + 1) * size])[::-1] for g in range(spec.n_group)]
    best = [g[0] if spec.group_score == "max" else torch.tensor(g[:2]).sum() for g in groups]
    kept = sorted(range(spec.n_group), key=lambda g: (-best[g], g))[: spec.topk_group]
    left = [e for e in range(len(scores_E)) if e // size in kept]
    return sorted(sorted(left, key=lambda e: (-scores_E[e], e))[: spec.top_k])


@settings(deadline=None, max_examples=60)
@given(gates())
def test_the_chosen_set_is_the_defined_one_ties_included(
    gate: tuple[torch.Tensor, GateSpec, torch.Tensor],
) -> None:
    logits_TE, spec, bias_E = gate
    scores_TE = logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()

    found = chosen(logits_TE, spec, bias_E)

    assert found == [choose_slowly(row, spec) for row in (scores_TE + bias_E).tolist()]


@settings(deadline=None, max_examples=60)
@given(gates())
def test_an_expert_chosen_with_and_without_bias_weighs_the_same(
    gate: tuple[torch.Tensor, GateSpec, torch.Tensor],
) -> None:
    logits_TE, spec, bias_E = gate

    biased, plain = weight_of(logits_TE, spec, bias_E), weight_of(logits_TE, spec, None)

    for with_bias, without in zip(biased, plain, strict=True):
        both = with_bias.keys() & without.keys()
        assert {e: with_bias[e] for e in both} == {e: without[e] for e in both}
