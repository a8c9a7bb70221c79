"""How fast a server computes: measured once, before it serves.

Only ratios between servers of one cluster mean anything, so all measure the same: a small batch on
the layer of which they hold most. It is what decode looks like, where weights are read for few
rows; how two devices compare in prefill may differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from expert_service.backend import Backend
from expertmesh.model import ModelSpec, Slot
from expertmesh.placement import group_by_layer

_ROWS = 32
_TRIES = 7
_ENOUGH_S = 0.5  # then no try begins: slow backends need few to be told apart


def measure_pairs_per_s(
    backend: Backend,
    spec: ModelSpec,
    slots: Sequence[Slot],
    dtype: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """(row, expert) pairs a second, in the best of some tries; 0 where no routed expert is held.

    The best, since all that disturbs a try makes it slower: on a host where others start, too.
    """
    held = group_by_layer(slots)
    routed = {
        layer: [expert for expert in held.get(layer.index, ()) if expert < layer.num_experts]
        for layer in spec.layers
    }
    layer = max(routed, key=lambda each: len(routed[each]))
    experts = routed[layer]
    if not experts:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    k = min(layer.top_k, len(experts))
    order = torch.rand(
        _ROWS, len(experts), generator=generator, dtype=torch.float32, device="cpu"
    ).argsort(1)[:, :k]
    ids = torch.tensor(experts, dtype=torch.int32, device="cpu")[order].contiguous()
    hidden = torch.randn(
        _ROWS, spec.hidden_size, generator=generator, dtype=torch.float32, device="cpu"
    ).to(dtype)
    weights = torch.full((_ROWS, k), 1.0 / k, dtype=torch.float32, device="cpu")

    backend.compute(layer.index, hidden, ids, weights)  # what is made once, is made here
    began, best_s = clock(), float("inf")
    for _ in range(_TRIES):
        start = clock()
        backend.compute(layer.index, hidden, ids, weights)
        end = clock()
        best_s = min(best_s, end - start)
        if end - began > _ENOUGH_S:
            break
    return ids.numel() / max(best_s, 1e-9)
