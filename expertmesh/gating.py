"""From router logits to chosen experts: pure functions, one interpreter for every family.

The gate of DeepSeek-V3 (arXiv 2412.19437, eq. 12-16), of which the others are special cases:

    s = sigmoid(logits) or softmax(logits)                       scores, float32
    c = s + b                                                    b decides who is chosen, no more
    c = -inf outside the best `topk_group` groups                group score: two highest c, or one
    chosen = TopK(c)                                             a tie goes to the lower index
    g = s[chosen], divided by its sum where the family does so, times `scale`

T tokens, H hidden size, E routed experts, G groups, K chosen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from expertmesh.errors import ConfigError
from expertmesh.model import GateSpec, GateWeights

#: Up to so many scores numpy is asked: on cold caches, as between two requests, its calls take half
#: to a third of torch's (6 of 64: 30 us instead of 100); with more, torch's sorting is faster.
_FEW_SCORES = 1024
#: From so many rows on, two reductions are six times as fast as topk (4096 rows); for one row they
#: are four times as slow.
_MANY_ROWS = 256


_Floats = npt.NDArray[np.float32]


class Routing(NamedTuple):
    """Who computes each token, and how much each answer counts. The order within a row is free."""

    expert_ids: torch.Tensor  # [T, K] int32, distinct within a row
    weights: torch.Tensor  # [T, K] float32


def check_gate(spec: GateSpec, num_experts: int) -> None:
    """Raises ConfigError when `spec` cannot choose among `num_experts` experts."""
    groups, kept = spec.n_group, spec.topk_group
    _require(spec.score in ("softmax", "sigmoid"), f"score is {spec.score!r}", "softmax or sigmoid")
    _require(groups >= 1, f"n_group is {groups}", "at least 1")
    _require(1 <= kept <= groups, f"topk_group is {kept}", f"1 to n_group={groups}")
    _require(num_experts >= 1, f"the layer has {num_experts} experts", "at least 1")
    _require(num_experts % groups == 0, f"n_group is {groups}", f"a divisor of {num_experts}")
    size = num_experts // groups
    _require(
        spec.group_score in ("max", "top2_sum"),
        f"group_score is {spec.group_score!r}",
        "max or top2_sum",
    )
    _require(1 <= spec.top_k <= kept * size, f"top_k is {spec.top_k}", f"1 to {kept * size}")
    _require(
        spec.group_score == "max" or kept == groups or size >= 2,
        f"group_score is {spec.group_score!r} with groups of {size}",
        "groups of 2 or more",
    )
    _require(math.isfinite(spec.scale), f"scale is {spec.scale}", "a finite number")
    eps = spec.renormalize_eps
    _require(math.isfinite(eps) and eps >= 0, f"renormalize_eps is {eps}", "0 or more")


def _require(condition: bool, is_now: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"the gate cannot work: {is_now}, expected {expected}")


def select(logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None = None) -> Routing:
    """Chooses `spec.top_k` experts for each row of logits, and weighs them.

    `bias_E` (float32) is added to the scores for selection only; None adds nothing. A row of
    non-finite logits yields distinct ids in range and weights that may be NaN; other rows do not
    notice. The spec must have passed `check_gate`.
    """
    scores_TE = scores(logits_TE, spec)
    rounded = spec.round_weights and logits_TE.dtype != torch.float32
    if _are_few(scores_TE) and not rounded:
        return _select_few(scores_TE.numpy(), spec, None if bias_E is None else bias_E.numpy())
    ids_TK = choose(scores_TE, spec, bias_E)
    weights_TK = scores_TE.gather(1, ids_TK)
    if spec.renormalize:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 + spec.renormalize_eps)
    if spec.scale != 1.0:
        weights_TK = weights_TK * spec.scale
    if rounded:
        weights_TK = weights_TK.to(logits_TE.dtype).float()
    return Routing(ids_TK.to(torch.int32), weights_TK)


def _are_few(scores_TE: torch.Tensor) -> bool:
    few = scores_TE.numel() <= _FEW_SCORES
    return few and scores_TE.device.type == "cpu" and not scores_TE.requires_grad


def _select_few(scores_TE: _Floats, spec: GateSpec, bias_E: _Floats | None) -> Routing:
    """`select` for few rows, in numpy. NaN is chosen last here."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.topk_group < spec.n_group:
        choice_TE = _mask_groups_few(choice_TE, spec)
    ids_TK = _largest(choice_TE, spec.top_k)
    weights_TK = scores_TE[np.arange(len(ids_TK))[:, None], ids_TK]
    if spec.renormalize:
        total_T1: _Floats = np.add.reduce(weights_TK, 1, keepdims=True)
        weights_TK /= total_T1 + np.float32(spec.renormalize_eps)
    if spec.scale != 1.0:
        weights_TK *= np.float32(spec.scale)
    return Routing(torch.from_numpy(ids_TK.astype(np.int32)), torch.from_numpy(weights_TK))


def _mask_groups_few(choice_TE: _Floats, spec: GateSpec) -> _Floats:
    """`_mask_groups` in numpy."""
    tokens, experts = choice_TE.shape
    choice_TGS = choice_TE.reshape(tokens, spec.n_group, experts // spec.n_group)
    highest = 1 if spec.group_score == "max" else 2
    group_TG = np.add.reduce(np.sort(choice_TGS, 2)[:, :, -highest:], 2)
    dropped_TG = np.ones(group_TG.shape, np.bool_)
    dropped_TG[np.arange(tokens)[:, None], _largest(group_TG, spec.topk_group)] = False
    return np.where(dropped_TG[:, :, None], np.float32(-np.inf), choice_TGS).reshape(
        tokens, experts
    )


def _largest(values_TN: _Floats, k: int) -> npt.NDArray[np.int64]:
    """`_top_indices` in numpy: a stable sort leaves equals in the order of their indices."""
    return np.argsort(-values_TN, axis=1, kind="stable")[:, :k]


def choose(
    scores_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None = None
) -> torch.Tensor:
    """The experts [T, K] int64 that rows of scores [T, E] float32 choose under a bias."""
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    return _top_indices(in_groups(choice_TE, spec), spec.top_k)


def in_groups(choice_TE: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """Biased scores with -inf outside the groups that each row may choose from."""
    return _mask_groups(choice_TE, spec) if spec.topk_group < spec.n_group else choice_TE


def choice_mask(
    scores_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None = None
) -> torch.Tensor:
    """The same choice as a mask [T, E]: whether a row chooses an expert."""
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
    return chosen_TE.scatter_(1, choose(scores_TE, spec, bias_E), True)


def changed_picks(ids_TK: torch.Tensor, own_TE: torch.Tensor) -> int:
    """How many of the picks are not in the rows' own choice, which is a mask."""
    return ids_TK.numel() - int(own_TE.gather(1, ids_TK.long()).sum())


def route(
    hidden_TH: torch.Tensor,
    gate: GateWeights,
    spec: GateSpec,
    bias_E: torch.Tensor | None = None,
) -> Routing:
    """Gates hidden states: logits as the family computes them, then `select`.

    `bias_E` is the whole serving bias (trained plus delta), not added to `gate.bias`; None routes
    without any.
    """
    return select(logits(hidden_TH, gate, spec), spec, bias_E)


def logits(hidden_TH: torch.Tensor, gate: GateWeights, spec: GateSpec) -> torch.Tensor:
    """Router logits [T, E], in float32 where the family says so, else in the dtype of the hidden
    states: that is the dtype in which the caller runs its model, and with it the model's gate."""
    if spec.logits_float32:
        return linear(hidden_TH.float(), gate.weight.float())
    return linear(hidden_TH, gate.weight.to(hidden_TH.dtype))


def shared_weights(hidden_TH: torch.Tensor, gate: GateWeights) -> torch.Tensor | None:
    """The weight [T] float32 of each token's shared expert: sigmoid(x . w); None where ungated."""
    if gate.shared_gate is None:
        return None
    score_T1 = torch.sigmoid(linear(hidden_TH, gate.shared_gate.to(hidden_TH.dtype)))
    return score_T1.squeeze(-1).float()


def scores(logits_TE: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """Scores [T, E] float32: what a bias is added to, and what weights are made of."""
    if spec.score == "softmax":
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    return torch.sigmoid(logits_TE.float())


def _mask_groups(choice_TE: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """-inf outside the best groups; 0 would win over negative biased scores."""
    tokens, experts = choice_TE.shape
    choice_TGS = choice_TE.view(tokens, spec.n_group, experts // spec.n_group)
    by_max = spec.group_score == "max"
    group_TG = choice_TGS.amax(dim=-1) if by_max else _two_highest(choice_TGS)
    dropped_TG = torch.ones_like(group_TG, dtype=torch.bool)
    dropped_TG.scatter_(1, _top_indices(group_TG, spec.topk_group), False)
    return choice_TGS.masked_fill(dropped_TG.unsqueeze(-1), -math.inf).flatten(1)


def _two_highest(values_TGS: torch.Tensor) -> torch.Tensor:
    """The sum of each group's two highest values."""
    if values_TGS.shape[0] < _MANY_ROWS:
        return values_TGS.topk(2, dim=-1).values.sum(dim=-1)
    first_TG1, where_TG1 = values_TGS.max(dim=-1, keepdim=True)
    second_TG = values_TGS.scatter(-1, where_TG1, -math.inf).amax(dim=-1)
    return first_TG1.squeeze(-1) + second_TG


def _top_indices(values_TN: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [T, k] of the k largest of each row; of equals at the boundary, the lowest indices.

    `torch.topk` breaks ties as it likes, so it is asked for one more value: a row whose k-th and
    (k+1)-th are equal is chosen again by a stable sort, which is slower and rarely needed. NaN
    equals nothing, hence is never repaired; topk counts it as the largest.
    """
    if k == values_TN.shape[1]:
        return torch.arange(k, device=values_TN.device).expand(values_TN.shape[0], k)
    top_values, top_ids = torch.topk(values_TN, k + 1, dim=-1)
    ids_Tk = top_ids[:, :k]
    tied_T = top_values[:, k - 1] == top_values[:, k]
    if tied_T.any():
        ordered = torch.sort(values_TN[tied_T], dim=-1, descending=True, stable=True).indices
        ids_Tk[tied_T] = ordered[:, :k]
    return ids_Tk
