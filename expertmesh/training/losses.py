"""The auxiliary losses that balance experts in training: what a bias policy takes the place of.

T tokens, E experts, K chosen experts a token, B sequences of S tokens, D devices.

Every loss is a pure function without a unit: a scalar that the caller multiplies by its own weight
(alpha) and adds to its cross-entropy in nats. Gradients flow through the scores only: which experts
were chosen is a count, and a count has no derivative. All arithmetic is fp32 or wider, as the
families compute their scores. Padding tokens are the caller's to leave out.

The other way to balance, without any loss, is `load_controller.policy.sign` on the counts of each
training step (arXiv 2408.15664).
"""

import torch


def expert_balance_loss(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Return sum_i f_i P_i: the expert-level balance loss (DeepSeekMoE, arXiv 2401.06066, eq. 12).

    f_i = E / (K T) * (how many tokens chose expert i), P_i = 1 / T * sum_t s_ti. DeepSeek-V2 calls
    it expert-level too (arXiv 2405.04434, eq. 23), and the baseline of arXiv 2408.15664 is the same
    formula over unnormalised sigmoid scores, with alpha = 0.001.

    Scores `[T, E]` are what the gate chose by (softmax or sigmoid, no bias), ids `[T, K]` the
    experts it chose. With softmax scores the value is 1 when all experts are chosen equally often,
    and E / K when K experts take all tokens and all of the probability. Raises ValueError for
    shapes or ids that do not fit.
    """
    _check(scores_TE, ids_TK)
    return (_frequency(scores_TE, ids_TK) * scores_TE.mean(0)).sum()


def device_balance_loss(
    scores_TE: torch.Tensor, ids_TK: torch.Tensor, device_E: torch.Tensor
) -> torch.Tensor:
    """Return sum_d f'_d P'_d: the device-level balance loss (arXiv 2405.04434, eq. 26).

    f'_d is the mean of f_i, and P'_d the sum of P_i, over the experts of device d, with f and P as
    in `expert_balance_loss`. It asks for devices that work equally hard, and leaves it open how the
    experts of one share the work.

    `device_E` int64 `[E]` is the device of each expert, numbered from 0; every number up to the
    highest must hold an expert. With softmax scores the value is 1 when each device gets its part.
    Raises ValueError for shapes, ids or devices that do not fit.
    """
    _check(scores_TE, ids_TK)
    experts = scores_TE.shape[1]
    if device_E.shape != (experts,):
        raise ValueError(f"device_E has shape {tuple(device_E.shape)}, expected {(experts,)}")
    if int(device_E.min()) < 0:
        raise ValueError(f"device_E has a device {int(device_E.min())}, expected 0 or more")
    held_D = torch.bincount(device_E)
    if int(held_D.min()) == 0:
        raise ValueError(f"device {int(held_D.argmin())} holds no expert, expected at least one")
    frequency_E, probability_E = _frequency(scores_TE, ids_TK), scores_TE.mean(0)
    zeros_D = torch.zeros(len(held_D), dtype=scores_TE.dtype, device=scores_TE.device)
    frequency_D = zeros_D.index_add(0, device_E, frequency_E) / held_D
    return (frequency_D * zeros_D.index_add(0, device_E, probability_E)).sum()


def sequence_balance_loss(scores_BSE: torch.Tensor, ids_BSK: torch.Tensor) -> torch.Tensor:
    """Return the mean over sequences of sum_i f_i P_i: DeepSeek-V3's (arXiv 2412.19437, eq. 17-20).

    Within one sequence f_i = E / (K S) * (how many of its tokens chose i), and P_i = 1 / S *
    sum_t s'_ti with s'_ti = s_ti / sum_j s_tj. A bias balances a batch and not a sequence, so V3
    adds this with alpha = 0.0001.

    Scores `[B, S, E]` are positive (V3: sigmoid), ids `[B, S, K]`. The value is 1 when every
    sequence chooses its experts equally often. Raises ValueError for shapes or ids that do not fit.
    """
    if scores_BSE.dim() != 3 or ids_BSK.dim() != 3 or ids_BSK.shape[:2] != scores_BSE.shape[:2]:
        raise ValueError(
            f"scores have shape {tuple(scores_BSE.shape)} and ids {tuple(ids_BSK.shape)},"
            " expected [B, S, E] and [B, S, K]"
        )
    _check(scores_BSE.flatten(0, 1), ids_BSK.flatten(0, 1))
    batch, _, experts = scores_BSE.shape
    chosen_BE = torch.zeros(batch, experts, dtype=scores_BSE.dtype, device=scores_BSE.device)
    ids_BR = ids_BSK.flatten(1).long()
    chosen_BE.scatter_add_(1, ids_BR, torch.ones_like(ids_BR, dtype=chosen_BE.dtype))
    frequency_BE = chosen_BE * (experts / ids_BR.shape[1])
    probability_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (frequency_BE * probability_BE).sum(-1).mean()


def switch_loss(probabilities_TE: torch.Tensor, first_T: torch.Tensor) -> torch.Tensor:
    """Return E * sum_i f_i P_i: the loss of Switch Transformers (arXiv 2101.03961, eq. 4-6).

    f_i is the share of tokens whose first choice is expert i, P_i the mean softmax probability
    `[T, E]` of expert i. Second choices do not count. 1 is balance, E is collapse onto one expert;
    Switch uses alpha = 0.01. Raises ValueError for shapes or ids that do not fit.
    """
    if first_T.dim() != 1:
        raise ValueError(f"first_T has shape {tuple(first_T.shape)}, expected [T]")
    return expert_balance_loss(probabilities_TE, first_T.unsqueeze(1))


def gshard_loss(probabilities_TE: torch.Tensor, first_T: torch.Tensor) -> torch.Tensor:
    """Return 1 / E * sum_i c_i / T * m_i: the loss of GShard (arXiv 2006.16668, algorithm 1).

    c_i is how many tokens have expert i as their first choice, m_i the mean softmax probability.
    It is `switch_loss` / E^2: 1 / E^2 is balance, 1 / E is collapse. GShard does not state its
    weight; whoever takes Switch's 0.01 multiplies by E^2. Raises ValueError as `switch_loss` does.
    """
    return switch_loss(probabilities_TE, first_T) / probabilities_TE.shape[1] ** 2


def _frequency(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """f_i `[E]`: 1 for an expert that was chosen as often as the mean one."""
    experts = scores_TE.shape[1]
    chosen_E = torch.bincount(ids_TK.flatten(), minlength=experts)
    return chosen_E.to(scores_TE.dtype) * (experts / ids_TK.numel())


def _check(scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> None:
    if scores_TE.dim() != 2 or ids_TK.dim() != 2 or len(ids_TK) != len(scores_TE):
        raise ValueError(
            f"scores have shape {tuple(scores_TE.shape)} and ids {tuple(ids_TK.shape)},"
            " expected [T, E] and [T, K]"
        )
    if scores_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores are {scores_TE.dtype}, expected float32 or float64")
    if ids_TK.numel() == 0:
        raise ValueError(f"ids have shape {tuple(ids_TK.shape)}, expected at least one choice")
    lowest, highest = int(ids_TK.min()), int(ids_TK.max())
    if lowest < 0 or highest >= scores_TE.shape[1]:
        raise ValueError(
            f"ids run from {lowest} to {highest}, expected 0 to {scores_TE.shape[1] - 1}"
        )
