"""Divides jobs on blocks of matrices among threads, so that all are through at about the same time.

A job's cost is in bytes: what is read from memory in the time that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from expert_service.kernels.cpu.block_product import BlockProduct
from expertmesh.kernels.compiling import BLOCK

#: A block's arithmetic for so many rows takes as long as its reading, which other threads do, too
#: (one of two threads, an AMD EPYC: 16 GB/s each, 1.1 microseconds a row and 2048 inputs).
_READ_ROWS = 14


def cost_of(job: BlockProduct) -> float:
    """Of all blocks of one matrix of the job, in bytes."""
    return (job.stop - job.first) * _block_cost(job)


def _block_cost(job: BlockProduct) -> float:
    return 4 * BLOCK * job.groups * max(1.0, job.rows / _READ_ROWS)


def share(costs: Sequence[float], parts: int, tolerance: float) -> list[slice] | None:
    """Neighbours together, in at most `parts` slices of about equal cost; none is empty.

    None where the dearest would be more than `tolerance` dearer than the average of `parts`.
    """
    total = sum(costs)
    if parts == 1 or not total:
        return [slice(0, len(costs))]
    stops = [0] * parts
    taken = [0.0] * parts
    before = 0.0
    for at, cost in enumerate(costs, 1):
        part = min(parts - 1, int(parts * (before + cost / 2) / total))
        stops[part] = at
        taken[part] += cost
        before += cost
    if max(taken) > total / parts + tolerance:
        return None
    starts = [0, *stops]
    return [slice(max(starts[: at + 1]), stop) for at, stop in enumerate(stops) if stop]


def cut(jobs: Sequence[BlockProduct], parts: int) -> list[list[BlockProduct]]:
    """The same blocks in the same order, in at most `parts` runs of about equal cost."""
    share_cost = sum(cost_of(job) for job in jobs) / parts
    runs: list[list[BlockProduct]] = [[]]
    room = share_cost
    for job in jobs:
        first, each = job.first, _block_cost(job)
        while first < job.stop:
            left = job.stop - first
            blocks = left if len(runs) == parts else min(left, round(room / each))
            if blocks <= 0:
                runs.append([])
                room += share_cost
                continue
            runs[-1].append(job._replace(first=first, stop=first + blocks))
            room -= blocks * each
            first += blocks
    return [run for run in runs if run]
