"""Sorts the (row, expert) pairs of one batch by expert, and sums them back by row.

R rows, K pairs asked per row, P pairs kept (id -1 is dropped), H hidden size. Sorted pairs are in
ascending order of expert, and of row within an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ExpertGroup(NamedTuple):
    """The sorted pairs `start .. stop - 1`, all of one expert."""

    expert: int
    start: int
    stop: int


class Grouping(NamedTuple):
    """One batch's pairs, sorted by expert."""

    groups: list[ExpertGroup]  # experts with at least one row
    rows: torch.Tensor  # int64 [P]: the row of each sorted pair
    weights: torch.Tensor  # float32 [P]: the weight of each pair, row by row
    positions: torch.Tensor  # int64 [P]: where each pair, row by row, is among the sorted ones
    offsets: torch.Tensor  # int64 [R]: where each row starts in `positions`

    def is_identity(self, rows: int) -> bool:
        """Whether the result is one expert's output on every row, as it is."""
        return len(self.groups) == 1 and len(self.rows) == rows and bool((self.weights == 1).all())


def group_by_expert(expert_ids_RK: torch.Tensor, weights_RK: torch.Tensor) -> Grouping:
    """Sorts the pairs of a batch by expert, dropping those with id -1. R may be 0."""
    R, K = expert_ids_RK.shape
    ids_RK = expert_ids_RK.reshape(-1)
    weights_P = weights_RK.reshape(-1)
    sorted_ids, order_P = torch.sort(ids_RK, stable=True)
    experts, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    runs = list(zip(experts.tolist(), counts.tolist(), strict=True))
    holes = runs.pop(0)[1] if runs and runs[0][0] < 0 else 0

    order_P = order_P[holes:]
    positions_P = torch.empty(R * K, dtype=torch.int64)
    positions_P[order_P] = torch.arange(R * K - holes)
    offsets_R = torch.arange(R) * K
    if holes:
        kept_RK = expert_ids_RK >= 0
        kept = kept_RK.reshape(-1)
        positions_P, weights_P = positions_P[kept], weights_P[kept]
        kept_R = kept_RK.sum(dim=1)
        offsets_R = torch.cumsum(kept_R, dim=0) - kept_R

    groups = []
    start = 0
    for expert, count in runs:
        groups.append(ExpertGroup(expert, start, start + count))
        start += count
    return Grouping(groups, order_P // max(K, 1), weights_P, positions_P, offsets_R)


def sum_by_row(
    y_PH: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Un-sorts and adds up: out[r] = sum of weight * y over the pairs of row r.

    `weights`, `positions` and `offsets` are those of a `Grouping`. Returns [R, H] in `y_PH`'s
    dtype; zeros for a row without pairs. The sum is taken in float32 and rounded once, in one
    pass over `y_PH`: no copy of it is un-sorted or multiplied.
    """
    if y_PH.dtype != torch.float32:
        # `embedding_bag` wants weights in the dtype of y, which would round them to 8 or 11
        # bits. Adding each row twice, times the weight's high and then its low part, keeps
        # float32's 16 to 22 leading bits; the second read of a row comes from L1.
        high = weights.to(y_PH.dtype)
        low = (weights - high.float()).to(y_PH.dtype)
        weights = torch.stack((high, low), dim=1).reshape(-1)
        positions = positions.repeat_interleave(2)
        offsets = offsets * 2
    return torch.embedding_bag(y_PH, positions, offsets, per_sample_weights=weights)[0]
