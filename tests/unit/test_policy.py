"""The bias policies, on written-out numbers and on a skewed gate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from load_controller.policy import (
    POLICIES,
    clamp_delta,
    max_violation,
    next_delta,
    proportional,
    scheduled_rate,
    sign,
)

Policy = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def test_sign_lowers_the_overloaded_and_raises_the_underloaded_by_the_same_step() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0])
    counts_E = torch.tensor([13, 1, 4, 6])  # mean 6

    moved_E = sign(bias_E, counts_E, 0.125)

    assert moved_E.tolist() == [0.375, 0.125, -0.125, 0.0]


def test_proportional_moves_by_the_error_relative_to_the_mean() -> None:
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0])
    counts_E = torch.tensor([14, 2, 4, 12])  # mean 8: errors -6, 6, 4, -4

    moved_E = proportional(bias_E, counts_E, 0.5)

    assert moved_E.tolist() == [0.125, 0.375, 0.0, -0.25]


def test_proportional_does_not_depend_on_how_long_the_window_was() -> None:
    bias_E = torch.zeros(4)
    counts_E = torch.tensor([14, 2, 4, 12])

    moved_E = proportional(bias_E, counts_E * 1000, 0.5)

    assert torch.equal(moved_E, proportional(bias_E, counts_E, 0.5))


@pytest.mark.parametrize("policy", [sign, proportional])
@pytest.mark.parametrize("counts", [[0, 0, 0], [7, 7, 7]], ids=["nothing counted", "balanced"])
def test_a_window_without_error_leaves_the_bias_unchanged(
    policy: Policy, counts: list[int]
) -> None:
    bias_E = torch.tensor([0.3, -0.2, 0.1])

    moved_E = policy(bias_E, torch.tensor(counts), 0.01)

    assert torch.equal(moved_E, bias_E)


def test_balance_is_recognised_beyond_the_integers_that_fp32_can_hold() -> None:
    bias_E = torch.zeros(3)
    counts_E = torch.tensor([2**24 + 1, 2**24 + 1, 2**24 + 2])

    moved_E = sign(bias_E, counts_E - torch.tensor([0, 0, 1]), 0.5)

    assert moved_E.tolist() == [0.0, 0.0, 0.0]
    assert sign(bias_E, counts_E, 0.5).tolist() == [0.5, 0.5, -0.5]


@pytest.mark.parametrize("policy", [sign, proportional])
def test_every_row_of_a_stack_is_a_layer_of_its_own(policy: Policy) -> None:
    bias_LE = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    counts_LE = torch.tensor([[3, 1], [100, 300], [0, 0]])

    moved_LE = policy(bias_LE, counts_LE, 0.5)

    rows = zip(bias_LE, counts_LE, strict=True)
    assert torch.equal(moved_LE, torch.stack([policy(b, c, 0.5) for b, c in rows]))


@pytest.mark.parametrize("policy", [sign, proportional])
def test_a_rate_of_zero_leaves_the_bias_unchanged(policy: Policy) -> None:
    assert policy(torch.tensor([0.5, -0.5]), torch.tensor([9, 1]), 0.0).tolist() == [0.5, -0.5]


def test_frozen_is_fp32_zeros_whatever_came_in() -> None:
    moved_E = POLICIES["frozen"](torch.ones(2, dtype=torch.bfloat16), torch.ones(2), 0.1)

    assert moved_E.dtype == torch.float32
    assert moved_E.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("policy", [sign, proportional])
def test_a_new_fp32_bias_is_returned_and_the_old_one_is_not_written(policy: Policy) -> None:
    bias_E = torch.zeros(2, dtype=torch.bfloat16)

    moved_E = policy(bias_E, torch.tensor([0, 2]), 0.001)

    assert moved_E.dtype == torch.float32
    assert moved_E.tolist() == pytest.approx([0.001, -0.001], abs=1e-9)
    assert bias_E.tolist() == [0.0, 0.0]


def test_clamp_holds_the_delta_within_its_bound_on_both_sides() -> None:
    delta_E = torch.tensor([-2.0, -0.5, 0.0, 0.25, 3.0])

    clamped_E = clamp_delta(delta_E, 0.5)

    assert clamped_E.tolist() == [-0.5, -0.5, 0.0, 0.25, 0.5]


def test_a_bound_of_zero_withdraws_the_delta() -> None:
    assert clamp_delta(torch.tensor([-2.0, 3.0]), 0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["frozen", "off"])
def test_frozen_and_off_serve_the_checkpoints_routing_whatever_the_counts(name: str) -> None:
    moved_E = POLICIES[name](torch.tensor([0.5, -0.5]), torch.tensor([9, 1]), 0.1)

    assert moved_E.tolist() == [0.0, 0.0]


def test_a_delta_is_decayed_then_moved_then_clamped() -> None:
    moved_E = next_delta(
        torch.tensor([-1.0, 1.0, 0.0]),
        torch.tensor([6, 0, 3]),
        policy="sign",
        update_rate=0.25,
        decay=0.5,
        max_delta=0.6,
    )

    assert moved_E.tolist() == pytest.approx([-0.6, 0.6, 0.0])


def test_a_delta_that_balance_no_longer_needs_decays_to_zero() -> None:
    delta_E = torch.tensor([-1.0, 1.0])
    for _ in range(200):
        delta_E = next_delta(
            delta_E, torch.tensor([5, 5]), policy="sign", update_rate=0.1, decay=0.05
        )

    assert float(delta_E.abs().max()) < 1e-4


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_no_share_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay is"):
        next_delta(torch.zeros(2), torch.ones(2), policy="sign", update_rate=0.1, decay=decay)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8]),
        ("inverse", [0.8, 0.8 / 1.5, 0.4, 0.1]),
        ("cosine", [0.8, 0.45, 0.1, 0.1]),
    ],
)
def test_a_schedule_lowers_the_rate_to_its_floor(schedule: Any, expected: list[float]) -> None:
    rates = [scheduled_rate(schedule, 0.8, n, over=100, floor=0.1) for n in (0, 50, 100, 9999)]

    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([4, 4, 4, 4], 0.0),
        ([7, 1, 2, 2], 4 / 3),
        ([12, 0, 0, 0], 3.0),
        ([1, 0, 0, 0], 3.0),
        ([0, 0, 0], 0.0),
        ([5], 0.0),
    ],
    ids=["balanced", "skewed", "all on one", "one in all", "nothing counted", "one expert"],
)
def test_max_violation_is_the_excess_of_the_fullest_over_the_mean(
    counts: list[int], expected: float
) -> None:
    assert max_violation(torch.tensor(counts)) == pytest.approx(expected)


@pytest.mark.parametrize("policy", [sign, proportional])
def test_counts_of_another_shape_than_the_bias_are_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(4,\) but counts have \(3,\)"):
        policy(torch.zeros(4), torch.ones(3), 0.1)


@pytest.mark.parametrize("policy", [sign, proportional])
@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_an_update_rate_that_is_no_step_is_refused(policy: Policy, rate: float) -> None:
    with pytest.raises(ValueError, match="update_rate is"):
        policy(torch.zeros(2), torch.ones(2), rate)


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_a_bound_that_is_no_bound_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="max_delta is"):
        clamp_delta(torch.zeros(2), bound)


@pytest.mark.parametrize("shape", [(2, 3), (0,), ()])
def test_max_violation_of_anything_but_one_layer_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\[E\\] with E >= 1"):
        max_violation(torch.zeros(shape))


def _counts_of_gate(scores_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int) -> torch.Tensor:
    """DeepSeek-V3's choice without groups: the top-k of sigmoid score + bias."""
    chosen_TK = (scores_TE + bias_E).topk(top_k, dim=-1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=len(bias_E))


def test_repeated_sign_updates_even_out_a_skewed_sigmoid_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    popularity_E = torch.linspace(-2.0, 2.0, 16)
    scores_TE = (torch.randn(2048, 16, generator=generator) + popularity_E).sigmoid()
    bias_E = torch.zeros(16)
    before = max_violation(_counts_of_gate(scores_TE, bias_E, 4))

    for _ in range(700):
        bias_E = sign(bias_E, _counts_of_gate(scores_TE, bias_E, 4), 0.001)

    after = max_violation(_counts_of_gate(scores_TE, bias_E, 4))
    assert before >= 1.0
    assert after <= 0.05


def test_repeated_proportional_updates_even_out_the_same_gate_further() -> None:
    generator = torch.Generator().manual_seed(0)
    popularity_E = torch.linspace(-2.0, 2.0, 16)
    scores_TE = (torch.randn(2048, 16, generator=generator) + popularity_E).sigmoid()
    bias_E = torch.zeros(16)

    for _ in range(700):
        counts_E = _counts_of_gate(scores_TE, bias_E, 4)
        bias_E = next_delta(bias_E, counts_E, policy="proportional", update_rate=0.01)

    assert max_violation(_counts_of_gate(scores_TE, bias_E, 4)) <= 0.02


def test_a_cosine_schedule_balances_in_a_tenth_of_the_windows_and_ends_as_calm() -> None:
    generator = torch.Generator().manual_seed(0)
    popularity_E = torch.linspace(-2.0, 2.0, 16)
    scores_TE = (torch.randn(2048, 16, generator=generator) + popularity_E).sigmoid()
    bias_E = torch.zeros(16)

    for window in range(70):
        rate = scheduled_rate("cosine", 0.02, window, over=70, floor=5e-4)
        counts_E = _counts_of_gate(scores_TE, bias_E, 4)
        bias_E = next_delta(bias_E, counts_E, policy="sign", update_rate=rate)

    assert max_violation(_counts_of_gate(scores_TE, bias_E, 4)) <= 0.05


def test_repeated_sign_updates_hold_on_batches_that_are_never_seen_twice() -> None:
    generator = torch.Generator().manual_seed(1)
    popularity_E = torch.linspace(-2.0, 2.0, 16)
    bias_E = torch.zeros(16)
    counts_over_last_windows_E = torch.zeros(16, dtype=torch.int64)

    for window in range(900):
        scores_TE = (torch.randn(1024, 16, generator=generator) + popularity_E).sigmoid()
        counts_E = _counts_of_gate(scores_TE, bias_E, 4)
        bias_E = sign(
            bias_E, counts_E, 0.001
        )  # after the counting: a batch never sees its own bias
        if window >= 700:
            counts_over_last_windows_E += counts_E

    assert max_violation(counts_over_last_windows_E) <= 0.05
