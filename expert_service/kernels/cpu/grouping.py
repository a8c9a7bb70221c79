"""Sorts the (row, expert) pairs of one batch by expert, and sums them back by row.

R rows, K pairs asked per row, P pairs kept (id -1 is dropped), S places of the sorted pairs, H
hidden size. Pairs are in ascending order of expert, and of row within an expert. Each expert's
places are cut into blocks, and each block may end in places that no pair has: the sizes of blocks
are few, so that matrix products of few sizes are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class Block(NamedTuple):
    """The places `start .. stop - 1`, all of one expert."""

    expert: int
    start: int
    stop: int


class Grouping(NamedTuple):
    """One batch's pairs, sorted by expert."""

    blocks: list[Block]  # of experts with at least one row; they cover all places, in order
    rows: torch.Tensor  # int64 [S]: the row at each place; any valid row where there is no pair
    weights: torch.Tensor  # float32 [P]: the weight of each pair, row by row
    places: torch.Tensor  # int64 [P]: the place of each pair, row by row
    offsets: torch.Tensor  # int64 [R + 1]: where each row starts in `places`, and the last ends

    def is_identity(self, rows: int) -> bool:
        """Whether the result is one expert's output on every row, as it is.

        Row r is at place r then, for only the last block of an expert has empty places.
        """
        return (
            bool(self.blocks)
            and self.blocks[0].expert == self.blocks[-1].expert
            and len(self.weights) == rows
            and bool((self.weights == 1).all())
        )


class BlockSizes(NamedTuple):
    """How many places a number of rows gets."""

    round_up: Callable[[int], int]  # the size of a block for so many rows, at most `largest`
    largest: int  # itself a size


def group_by_expert(
    expert_ids_RK: torch.Tensor, weights_RK: torch.Tensor, sizes: BlockSizes
) -> Grouping:
    """Sorts the pairs of a batch by expert, dropping those with id -1. R may be 0.

    In numpy, whose calls cost less than torch's where pairs are few, and no more where not.
    """
    R, K = expert_ids_RK.shape
    if R == 1:
        return _group_row(expert_ids_RK[0].tolist(), weights_RK[0].tolist(), sizes)
    ids = expert_ids_RK.numpy().reshape(-1)
    order = _stable_order(ids)
    sorted_ids = ids[order]
    holes = int(sorted_ids.searchsorted(0))
    order, sorted_ids = order[holes:], sorted_ids[holes:]
    starts = [0, *(1 + np.flatnonzero(sorted_ids[1:] != sorted_ids[:-1])).tolist()]
    counts = [stop - start for start, stop in pairwise([*starts, len(order)])]
    runs = list(zip(sorted_ids[starts].tolist(), counts, strict=True)) if len(order) else []
    blocks, gaps = _cut(runs, sizes)

    places_S = blocks[-1].stop if blocks else 0
    place = np.arange(len(order))
    if places_S > len(order):
        # Each expert's pairs lie as far beyond their rank as those before have empty places.
        place += np.repeat(gaps, counts)
    rows = np.zeros(places_S, dtype=np.int64)
    rows[place] = order // max(K, 1)

    places = np.empty(R * K, dtype=np.int64)
    places[order] = place
    weights_P = weights_RK.reshape(-1)
    offsets = np.arange(R + 1) * K
    if holes:
        kept = ids >= 0
        places, weights_P = places[kept], weights_P[torch.from_numpy(kept)]
        kept.reshape(R, K).sum(axis=1).cumsum(out=offsets[1:])
    rows_S, places_P, offsets_R1 = map(torch.from_numpy, (rows, places, offsets))
    return Grouping(blocks, rows_S, weights_P, places_P, offsets_R1)


def _stable_order(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Positions in ascending order of id. Of many, numbers of 16 bits are sorted sooner."""
    if len(ids) > 256 and int(ids.max()) < 1 << 15:
        return ids.astype(np.int16).argsort(kind="stable")
    return ids.argsort(kind="stable")


def _group_row(ids: list[int], weights: list[float], sizes: BlockSizes) -> Grouping:
    """One row's pairs: what there is to sort is done before a torch call would have begun."""
    kept = [(expert, weight) for expert, weight in zip(ids, weights, strict=True) if expert >= 0]
    ranked = sorted((expert, rank) for rank, (expert, _) in enumerate(kept))
    blocks, _ = _cut([(expert, 1) for expert, _ in ranked], sizes)
    places = [0] * len(kept)
    for (_, rank), block in zip(ranked, blocks, strict=True):
        places[rank] = block.start
    return Grouping(
        blocks,
        torch.zeros(blocks[-1].stop if blocks else 0, dtype=torch.int64, device="cpu"),
        torch.from_numpy(np.array([weight for _, weight in kept], dtype=np.float32)),
        torch.from_numpy(np.array(places, dtype=np.int64)),
        torch.from_numpy(np.array([0, len(kept)])),
    )


def _cut(runs: list[tuple[int, int]], sizes: BlockSizes) -> tuple[list[Block], list[int]]:
    """Blocks for (expert, rows) in order, and how many empty places lie before each expert."""
    blocks, gaps = [], []
    start = pairs = 0
    for expert, count in runs:
        gaps.append(start - pairs)
        pairs += count
        while count > 0:
            stop = start + sizes.round_up(min(count, sizes.largest))
            blocks.append(Block(expert, start, stop))
            count -= sizes.largest
            start = stop
    return blocks, gaps


def chunks(blocks: list[Block], most: int) -> list[list[Block]]:
    """The blocks in order, in runs of at most `most` places, or of one block that has more."""
    runs: list[list[Block]] = []
    for block in blocks:
        if not runs or block.stop - runs[-1][0].start > most:
            runs.append([])
        runs[-1].append(block)
    return runs


def sum_by_row(
    y_SH: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Un-sorts and adds up: out[r] = sum of weight * y over the pairs of row r.

    `weights`, `places` and `offsets` are those of a `Grouping`. Returns [R, H] in `y_SH`'s
    dtype; zeros for a row without pairs. The sum is taken in float32 and rounded once, in one
    pass over `y_SH`: no copy of it is un-sorted or multiplied.
    """
    if y_SH.dtype != torch.float32:
        # `embedding_bag` wants weights in the dtype of y, which would round them to 8 or 11
        # bits. Adding each row twice, times the weight's high and then its low part, keeps
        # float32's 16 to 22 leading bits; the second read of a row comes from L1.
        high = weights.to(y_SH.dtype)
        low = (weights - high.float()).to(y_SH.dtype)
        weights = torch.stack((high, low), dim=1).reshape(-1)
        places = places.repeat_interleave(2)
        offsets = offsets * 2
    return torch.embedding_bag(
        y_SH, places, offsets, per_sample_weights=weights, include_last_offset=True
    )[0]
