"""How counts become biases: pure functions, torch only.

E experts of one layer; c_i = tokens given to expert i in a closed window; mean = sum(c) / E.
The bias is added to the gate's score for *selection only* (arXiv 2412.19437, section 2.1.2), so
these functions move who is chosen and never what a chosen expert weighs.

Bias and counts may carry leading dimensions, `[..., E]`; every row is a layer of its own. What
comes out is fp32, because a bf16 bias re-orders experts whose scores are close.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch

Policy = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def frozen(delta_E: torch.Tensor, counts_E: torch.Tensor, update_rate: float) -> torch.Tensor:
    """Return zeros: the checkpoint's own routing, whatever the counts.

    "off" is the same rule; it differs in that nobody closes windows for it.
    """
    _error(delta_E, counts_E, update_rate)
    return torch.zeros_like(delta_E, dtype=torch.float32)


def sign(bias_E: torch.Tensor, counts_E: torch.Tensor, update_rate: float) -> torch.Tensor:
    """Return b_i + u * sign(mean - c_i): every expert moves by the same step (arXiv 2408.15664).

    An expert above the mean goes down, one below goes up, one exactly at the mean stays. A row in
    which nothing was counted is returned unchanged.
    """
    error_E = _error(bias_E, counts_E, update_rate)
    return bias_E.float() + update_rate * error_E.sign().float()


def proportional(bias_E: torch.Tensor, counts_E: torch.Tensor, update_rate: float) -> torch.Tensor:
    """Return b_i + u * (mean - c_i) / mean: the step shrinks as the load evens out.

    This is the variant of arXiv 2408.15664, table 3. The paper does not write the division, but raw
    counts (about 2e5 tokens an expert) could not work with its rates of 1e-4 to 1e-2, so the error
    is taken relative to the mean. A row in which nothing was counted is returned unchanged.
    """
    error_E = _error(bias_E, counts_E, update_rate)
    mean = _mean(counts_E)
    # Where nothing was counted the error is 0, and so is its share of any number.
    relative_E = error_E / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return bias_E.float() + update_rate * relative_E.float()


#: Every rule by its name in BalanceConfig.policy, or in .mode where that is not "adaptive".
POLICIES: dict[str, Policy] = {
    "sign": sign,
    "proportional": proportional,
    "frozen": frozen,
    "off": frozen,
}


def next_delta(
    delta_E: torch.Tensor,
    counts_E: torch.Tensor,
    *,
    policy: str,
    update_rate: float,
    decay: float = 0.0,
    max_delta: float | None = None,
) -> torch.Tensor:
    """Return the serving delta after one closed window: decayed, moved by `policy`, clamped.

    The trained bias is not here: whoever serves adds the delta to it.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, expected a number in [0, 1)")
    moved_E = POLICIES[policy](delta_E.float() * (1.0 - decay), counts_E, update_rate)
    return moved_E if max_delta is None else clamp_delta(moved_E, max_delta)


def scheduled_rate(
    schedule: Literal["constant", "inverse", "cosine"],
    update_rate: float,
    window: int,
    *,
    over: int,
    floor: float,
) -> float:
    """Return u for the window of that number (the first is 0).

    "constant": u. "inverse": u / (1 + n / over). "cosine": half a cosine from u to the floor in
    `over` windows, and the floor from then on. Neither goes below `floor`.
    """
    if schedule == "constant":
        return update_rate
    if schedule == "inverse":
        return max(floor, update_rate / (1.0 + window / over))
    part = min(window / over, 1.0)
    return floor + (update_rate - floor) * 0.5 * (1.0 + math.cos(math.pi * part))


def clamp_delta(delta_E: torch.Tensor, max_delta: float) -> torch.Tensor:
    """Hold the delta (serving bias - trained bias) within [-max_delta, max_delta]."""
    if not max_delta >= 0:
        raise ValueError(f"max_delta is {max_delta}, expected a number >= 0")
    return delta_E.float().clamp(-max_delta, max_delta)


def max_violation(counts_E: torch.Tensor) -> float:
    """Return MaxVio = (max_i c_i - mean) / mean of one layer (arXiv 2408.15664).

    0 is perfect balance, E - 1 is everything on one expert. 0 also where nothing was counted: a
    layer that had no traffic violates nothing.
    """
    if counts_E.dim() != 1 or counts_E.numel() == 0:
        raise ValueError(f"counts have shape {tuple(counts_E.shape)}, expected [E] with E >= 1")
    mean = float(_mean(counts_E))
    return (float(counts_E.max()) - mean) / mean if mean > 0 else 0.0


def _error(bias_E: torch.Tensor, counts_E: torch.Tensor, update_rate: float) -> torch.Tensor:
    """mean - c_i in fp64, after the checks that both policies share."""
    if bias_E.shape != counts_E.shape:
        raise ValueError(
            f"bias has shape {tuple(bias_E.shape)} but counts have {tuple(counts_E.shape)}"
        )
    if not update_rate >= 0:
        raise ValueError(f"update_rate is {update_rate}, expected a number >= 0")
    return _mean(counts_E) - counts_E.double()


def _mean(counts_E: torch.Tensor) -> torch.Tensor:
    """Mean over the experts, kept as `[..., 1]`.

    fp64 holds every count below 2**53 exactly, so an expert at the mean has an error of exactly
    zero; in fp32 a long window's rounding would push perfectly balanced experts about.
    """
    return counts_E.double().sum(-1, keepdim=True) / counts_E.shape[-1]
