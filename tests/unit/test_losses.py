"""The auxiliary losses of expertmesh.training, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from expertmesh.training import (
    device_balance_loss,
    expert_balance_loss,
    gshard_loss,
    sequence_balance_loss,
    switch_loss,
)

EXPERTS, TOP_K = 8, 2
DEVICES = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])  # of unequal size

# Four tokens, three experts, one choice each. f = 3/4 * (2, 1, 1), P = (0.45, 0.275, 0.275).
SCORES = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.3, 0.5, 0.2], [0.2, 0.2, 0.6]])
FIRST = torch.tensor([0, 0, 1, 2])


def _balanced() -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax scores of which every expert has the same share, and the two highest of each row."""
    row = torch.softmax(torch.arange(EXPERTS, dtype=torch.float64), 0)
    scores_TE = torch.stack([row.roll(shift) for shift in range(EXPERTS)])
    return scores_TE, scores_TE.topk(TOP_K).indices


def _drawn(tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    logits_TE = torch.randn(
        tokens, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    logits_TE[:, 5] += 1.0
    return logits_TE, logits_TE.topk(TOP_K).indices


def test_the_expert_loss_of_a_small_batch_is_the_one_worked_out_by_hand() -> None:
    loss = expert_balance_loss(SCORES, FIRST.unsqueeze(1))

    assert loss.item() == pytest.approx(1.5 * 0.45 + 0.75 * 0.275 + 0.75 * 0.275)


def test_the_expert_loss_counts_all_choices_of_a_token() -> None:
    ids_TK = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 0]])  # f = 3/8 * (4, 2, 2)

    loss = expert_balance_loss(SCORES, ids_TK)

    assert loss.item() == pytest.approx(1.5 * 0.45 + 0.75 * 0.275 + 0.75 * 0.275)


def test_the_device_loss_means_the_frequencies_and_sums_the_probabilities() -> None:
    loss = device_balance_loss(SCORES, FIRST.unsqueeze(1), torch.tensor([1, 0, 1]))

    # Device 0 holds expert 1, device 1 holds experts 0 and 2.
    assert loss.item() == pytest.approx(0.75 * 0.275 + (1.5 + 0.75) / 2 * (0.45 + 0.275))


def test_the_device_loss_of_one_expert_a_device_is_the_expert_loss() -> None:
    scores_TE, ids_TK = _drawn()

    loss = device_balance_loss(scores_TE, ids_TK, torch.arange(EXPERTS))

    assert loss.item() == pytest.approx(expert_balance_loss(scores_TE, ids_TK).item(), rel=1e-12)


def test_the_sequence_loss_normalises_scores_and_judges_each_sequence_alone() -> None:
    # Twice the scores normalise to the same; the halves are two sequences of two tokens.
    scores_BSE, ids_BSK = 2 * SCORES.view(2, 2, 3), FIRST.view(2, 2, 1)

    loss = sequence_balance_loss(scores_BSE, ids_BSK)

    first = 3.0 * 0.65  # both of its tokens chose expert 0
    second = 1.5 * 0.35 + 1.5 * 0.4  # one token each on experts 1 and 2
    assert loss.item() == pytest.approx((first + second) / 2)


def test_two_sequences_that_balance_only_each_other_cost_more_than_balanced_ones() -> None:
    scores_TE, ids_TK = _balanced()
    alone = torch.stack([scores_TE[:1].expand(4, -1), scores_TE[4:5].expand(4, -1)])
    ids = torch.stack([ids_TK[:1].expand(4, -1), ids_TK[4:5].expand(4, -1)])

    assert sequence_balance_loss(scores_TE[None], ids_TK[None]).item() == pytest.approx(1.0)
    assert sequence_balance_loss(alone, ids).item() > 3.0


def test_the_switch_loss_is_the_share_of_first_choices_times_the_probability() -> None:
    loss = switch_loss(SCORES, FIRST)

    assert loss.item() == pytest.approx(3 * (0.5 * 0.45 + 0.25 * 0.275 + 0.25 * 0.275))


def test_the_gshard_loss_is_the_mean_over_experts_of_share_times_probability() -> None:
    loss = gshard_loss(SCORES, FIRST)

    assert loss.item() == pytest.approx((0.5 * 0.45 + 0.25 * 0.275 + 0.25 * 0.275) / 3)


def _switch(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    return switch_loss(scores_TE, ids_TK[:, 0])


def _gshard(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    return EXPERTS**2 * gshard_loss(scores_TE, ids_TK[:, 0])


def _device(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    return device_balance_loss(scores_TE, ids_TK, DEVICES)


def _sequence(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    return sequence_balance_loss(scores_TE[None], ids_TK[None])


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOSSES = pytest.mark.parametrize(
    "loss", [expert_balance_loss, _device, _sequence, _switch, _gshard]
)


@LOSSES
def test_perfect_balance_costs_one(loss: Loss) -> None:
    assert loss(*_balanced()).item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "worst"),
    [(expert_balance_loss, EXPERTS / TOP_K), (_switch, EXPERTS), (_gshard, EXPERTS)],
)
def test_collapse_onto_the_fewest_experts_costs_the_most(loss: Loss, worst: float) -> None:
    scores_TE = torch.zeros(5, EXPERTS, dtype=torch.float64)
    ids_TK = torch.tensor([[3, 6]]).expand(5, -1)
    scores_TE[:, 3] = 1.0

    assert loss(scores_TE, ids_TK).item() == pytest.approx(worst)


@LOSSES
def test_uneven_choices_cost_more_than_even_ones(loss: Loss) -> None:
    logits_TE, ids_TK = _drawn(64)

    assert loss(torch.softmax(logits_TE, 1), ids_TK).item() > 1.02


@LOSSES
@pytest.mark.parametrize("score", [torch.sigmoid, lambda logits: torch.softmax(logits, 1)])
def test_gradients_are_those_of_finite_differences(
    loss: Loss, score: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    logits_TE, ids_TK = _drawn()
    logits_TE.requires_grad_()

    assert torch.autograd.gradcheck(lambda logits: loss(score(logits), ids_TK), (logits_TE,))


@LOSSES
def test_a_step_against_the_gradient_lowers_the_probability_of_what_is_chosen_most(
    loss: Loss,
) -> None:
    logits_TE, ids_TK = _drawn(64)
    most = int(torch.bincount(ids_TK.flatten()).argmax())
    logits_TE.requires_grad_()

    loss(torch.softmax(logits_TE, 1), ids_TK).backward()
    stepped_TE = (logits_TE - 0.1 * logits_TE.grad).softmax(1)  # type: ignore[operator]

    assert stepped_TE.mean(0)[most] < logits_TE.softmax(1).mean(0)[most]


@pytest.mark.parametrize(
    ("scores", "ids", "says"),
    [
        (SCORES, FIRST, r"ids \(4,\), expected"),
        (SCORES, FIRST[:3, None], r"ids \(3, 1\), expected"),
        (SCORES, FIRST[:, None] + 1, "from 1 to 3, expected 0 to 2"),
        (SCORES, FIRST[:, None] - 1, "from -1 to 1, expected 0 to 2"),
        (SCORES[:0], FIRST[:0, None], "at least one choice"),
        (SCORES.bfloat16(), FIRST[:, None], "bfloat16, expected float32"),
    ],
)
def test_what_does_not_fit_is_refused(scores: torch.Tensor, ids: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        expert_balance_loss(scores, ids)


@pytest.mark.parametrize(
    ("devices", "says"),
    [([0, 1], r"\(2,\), expected \(3,\)"), ([0, 2, 2], "device 1 holds no"), ([-1, 0, 0], "-1")],
)
def test_devices_that_do_not_fit_are_refused(devices: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        device_balance_loss(SCORES, FIRST[:, None], torch.tensor(devices))


def test_a_sequence_loss_without_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, S, E\] and \[B, S, K\]"):
        sequence_balance_loss(SCORES, FIRST[:, None])
