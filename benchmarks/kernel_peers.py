"""Others' ways to compute the same experts, in this process: torch and transformers.

`gate_up` is [E, 2 I, H] with the gate's rows first, `down` [E, H, I]. Each side takes hidden states
[T, H], ids [T, K] and weights [T, K], and returns [T, H]. What it needs of memory beside the
weights is bounded: a side that copies weights is left out where they do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_COPY_BYTES = 8 << 30  # batched_mm copies every pair's weights


def grouped_mm_pipeline(gate_up: torch.Tensor, down: torch.Tensor) -> Side:
    """Sort, two `grouped_mm`, un-sort and sum, as one would write it with torch. No waits."""
    experts = len(gate_up)

    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens, k = ids.shape
        sorted_ids, order = ids.reshape(-1).sort()
        bounds = torch.arange(experts, device=ids.device, dtype=sorted_ids.dtype)
        offsets = torch.searchsorted(sorted_ids, bounds, right=True).to(torch.int32)
        x = hidden[order // k]
        gate_half, up_half = _grouped_mm(x, gate_up.mT, offsets).chunk(2, dim=-1)
        y = _grouped_mm(torch.nn.functional.silu(gate_half) * up_half, down.mT, offsets)
        out = torch.empty_like(y)
        out[order] = y * weights.reshape(-1)[order, None].to(y.dtype)
        return out.view(tokens, k, -1).sum(1)

    return run


def _grouped_mm(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.grouped_mm(x, w, offs=offsets)


def transformers_experts(name: str, gate_up: torch.Tensor, down: torch.Tensor) -> Side | None:
    """transformers' implementation of that name ("grouped_mm", "batched_mm") on a Qwen3 layer's
    experts; None where transformers is not installed."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return None
    experts, doubled, hidden_size = gate_up.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden_size, moe_intermediate_size=doubled // 2, num_experts=experts
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)

    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module(hidden, ids, weights.to(hidden.dtype))
        return out

    return run


def peers(gate_up: torch.Tensor, down: torch.Tensor) -> dict[str, Side]:
    """By name, for weights of 16 bits."""
    found: dict[str, Side | None] = {"torch grouped_mm": grouped_mm_pipeline(gate_up, down)}
    for name in ("grouped_mm", "batched_mm"):
        found[f"hf {name}"] = transformers_experts(name, gate_up, down)
    return {name: side for name, side in found.items() if side is not None}


def fits(name: str, pairs: int, expert_bytes: int) -> bool:
    """Whether a side's copies stay within bounds for that many pairs."""
    return "batched_mm" not in name or pairs * expert_bytes <= _COPY_BYTES


def in_bfloat16(side: Side) -> Side:
    """The side between casts: for a batch in a dtype that it does not take."""

    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return side(hidden.bfloat16(), ids, weights).to(hidden.dtype)

    return run


def compiled(side: Side, backend: str) -> Side:
    """The side under `torch.compile`, for any number of tokens."""
    options: dict[str, Any] = {"dynamic": True, "backend": backend}
    run: Side = torch.compile(side, **options)
    return run
