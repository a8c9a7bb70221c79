"""The published greedy algorithm of DeepSeek's EPLB, written from its description: a comparator.

Groups are packed onto nodes, redundant copies go to the largest load per copy of their node, copies
are packed onto GPUs; each packing takes the heaviest first, into the least loaded that has room.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def _balanced_packing(weights: Sequence[float], packs: int) -> list[int]:
    """The pack of each item: heaviest first, into the least loaded pack that has room."""
    room = len(weights) // packs
    used, pack_of = [0] * packs, [0] * len(weights)
    open_packs = [(0.0, pack) for pack in range(packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        load, pack = heapq.heappop(open_packs)
        pack_of[item] = pack
        used[pack] += 1
        if used[pack] < room:
            heapq.heappush(open_packs, (load + weights[item], pack))
    return pack_of


def _copies(weights: Sequence[float], slots: int) -> list[int]:
    """One copy each; every further one to the largest load per copy."""
    copies = [1] * len(weights)
    hottest = [(-weight, expert) for expert, weight in enumerate(weights)]
    heapq.heapify(hottest)
    for _ in range(slots - len(weights)):
        _, expert = hottest[0]
        copies[expert] += 1
        heapq.heapreplace(hottest, (-weights[expert] / copies[expert], expert))
    return copies


def _pack_loads(weights: Sequence[float], pack_of: Sequence[int], packs: int) -> list[float]:
    loads = [0.0] * packs
    for weight, pack in zip(weights, pack_of, strict=True):
        loads[pack] += weight
    return loads


def published(load: Floats, slots: int, groups: int, nodes: int, gpus: int) -> float:
    """MaxVio over the GPUs of one layer; copies of one expert may share a GPU there."""
    if groups % nodes:
        groups = nodes = 1
    by_group = np.split(load, groups)
    node_of = _balanced_packing([float(group.sum()) for group in by_group], nodes)
    loads: list[float] = []
    for node in range(nodes):
        here = [float(w) for g, n in zip(by_group, node_of, strict=True) if n == node for w in g]
        copies = _copies(here, slots // nodes)
        shares = [w / c for w, c in zip(here, copies, strict=True) for _ in range(c)]
        packs = gpus // nodes
        loads += _pack_loads(shares, _balanced_packing(shares, packs), packs)
    return max(loads) / (sum(loads) / gpus) - 1
