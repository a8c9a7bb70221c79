"""How fast a server computes: measured once, before it serves.

Only ratios between servers of one cluster mean anything, so all measure the same: a small batch on
the layer of which they hold most. It is what decode looks like, where weights are read for few
rows; how two devices compare in prefill may differ.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from expert_service.backend import Backend
from expertmesh.model import ModelSpec, Slot

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
    by_layer = Counter(slot.layer for slot in slots if _is_routed(spec, slot))
    if not by_layer:
        return 0.0
    layer = min(by_layer, key=lambda each: (-by_layer[each], each))
    experts = [slot.expert for slot in slots if slot.layer == layer and _is_routed(spec, slot)]
    generator = torch.Generator().manual_seed(0)
    k = min(_top_k(spec, layer), len(experts))
    order = torch.rand(_ROWS, len(experts), generator=generator).argsort(1)[:, :k]
    ids = torch.tensor(experts, dtype=torch.int32)[order].contiguous()
    hidden = torch.randn(_ROWS, spec.hidden_size, generator=generator).to(dtype)
    weights = torch.full((_ROWS, k), 1.0 / k)

    backend.compute(layer, hidden, ids, weights)  # what is made once, is made here
    began, best_s = clock(), float("inf")
    for _ in range(_TRIES):
        start = clock()
        backend.compute(layer, hidden, ids, weights)
        end = clock()
        best_s = min(best_s, end - start)
        if end - began > _ENOUGH_S:
            break
    return ids.numel() / max(best_s, 1e-9)


def _is_routed(spec: ModelSpec, slot: Slot) -> bool:
    layer = spec.layer(slot.layer)
    return layer is not None and layer.kind == "moe" and slot.expert < layer.num_experts


def _top_k(spec: ModelSpec, layer: int) -> int:
    found = spec.layer(layer)
    assert found is not None  # it holds slots
    return found.top_k
