"""How many rows and pairs a batch is padded to, and how a large one is cut. Pure.

R rows, K pairs asked per row. A CUDA graph computes one fixed number of rows: a smaller batch is
padded with rows whose ids are -1, which cost a few empty blocks and no weights.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable
from itertools import pairwise

#: Rows of the recorded graphs. Below 64 pairs an expert, time goes with weights read, not rows.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Rows for each expert at which a GPU's matrix units, not its memory, set the time: 780 TFLOP/s
#: over 4.3 TB/s (H200) is 181 multiply-adds a bf16 weight. Smaller pieces read weights in vain.
_ROWS_PER_EXPERT = 256
_MIN_CHUNK, _MAX_CHUNK = 1024, 8192


def bucket_rows(rows: int) -> int | None:
    """The smallest bucket that holds that many rows, at least 1; None where there is none."""
    index = bisect_left(BUCKETS, rows)
    return BUCKETS[index] if index < len(BUCKETS) else None


def padded_pairs(pairs_per_row: int, usual: int) -> int:
    """K as the kernels see it: `usual` for all that a model asks for, so that they know one K.

    More than that, which only a caller that gates can ask, is rounded up to a power of two.
    """
    if pairs_per_row <= usual:
        return usual
    return 1 << (pairs_per_row - 1).bit_length()


def chunk_rows(experts: int, pairs_per_row: int) -> int:
    """Rows of one piece of a large batch: its copies overlap with another's computing.

    Large enough that reading the weights once more for each piece does not show.
    """
    wanted = _ROWS_PER_EXPERT * max(1, experts) // max(1, pairs_per_row)
    power = 1 << max(0, wanted - 1).bit_length()
    return min(max(power, _MIN_CHUNK), _MAX_CHUNK)


def likely_pairs(rows: int, pairs_per_row: int, held: int, experts: int) -> int:
    """About how many pairs of that many rows fall on `held` of a layer's experts, for its tiles.

    A row that is sent here has at least one expert here, and each expert at most once.
    """
    here = min(held, max(1, round(pairs_per_row * held / max(1, experts))))
    return rows * min(here, pairs_per_row)


def split_rows(rows: int, chunk: int) -> list[tuple[int, int]]:
    """(start, stop) of each piece: as few as possible, none above `chunk`, sizes alike."""
    pieces = -(-rows // chunk)
    bounds = [rows * piece // pieces for piece in range(pieces + 1)] if pieces else [0]
    return list(pairwise(bounds))


def warm_rows(chunk: int, tiles: Callable[[int], Hashable]) -> list[int]:
    """Numbers of rows that between them meet every tile of a batch above the buckets and up to
    `chunk` rows, the largest first; `tiles` says which one a number of rows gets."""
    seen = {tiles(rows): rows for rows in range(BUCKETS[-1] + 1, chunk + 1)}
    return sorted({chunk, *seen.values()}, reverse=True)
