"""Rows whose experts no rounding of their logits changes."""

from __future__ import annotations

from pathlib import Path

import torch

from expertmesh import gating
from router_service.server import open_model

_NOISE = 1e-5  # a hundred times what float32 rounds such logits by
_DRAWS = 8


def rows_apart(path: Path, layer: int, count: int, seed: int) -> torch.Tensor:
    """`count` random rows, without those that are near a tie at the layer's gate.

    Of a million rows about one chooses other experts in another order of its sums, as a router and
    a model in process have it, and is then right in both.
    """
    model = open_model(path)
    gate, spec = model.gates[layer], model.spec.layer(layer).gate
    assert spec is not None
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * count, model.spec.hidden_size, generator=generator)
    logits = gating.logits(hidden, gate, spec)

    def chosen(noise: float) -> torch.Tensor:
        moved = logits + noise * torch.randn(logits.shape, generator=generator)
        return gating.select(moved, spec, gate.bias).expert_ids.sort(1).values

    same = torch.ones(len(hidden), dtype=torch.bool)
    for _ in range(_DRAWS):
        same &= (chosen(_NOISE) == chosen(0.0)).all(1)
    return hidden[same][:count]
