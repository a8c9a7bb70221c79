"""Which tiles to try, and which of them to keep: the decisions of `tune_kernels.py`.

A search for one product starts at the rule's tile, and changes one side of it at a time for as long
as that makes it faster: some ten tiles are compiled and timed, not all hundreds. Both products are
searched for each size of block near the rule's, since they share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from expert_service.kernels.triton_tiles import (
    Precision,
    Tile,
    Tiles,
    choose_block_m,
    rule_tiles,
    rule_tiles_for,
)

Product = Literal["gate_up", "down"]
#: Microseconds of a product with a tile; infinite where it does not run, or not right.
TimeOf = Callable[[Product, Tile], float]

#: Tokens that a table has entries for; first those of the roofline, should time run out.
TOKENS = (1, 16, 128, 1024, 8192, 2, 4, 8, 32, 64, 256, 512)

_MATRICES: dict[Product, int] = {"gate_up": 2, "down": 1}
_ITEM_BYTES: dict[Precision, tuple[int, int]] = {  # of an activation and of a weight
    "fp32": (4, 4),
    "fp16": (2, 2),
    "bf16": (2, 2),
    "w8a16": (2, 1),
    "w8a8": (1, 1),
}
_SHARED_BYTES = 227 * 1024
#: Sums of a thread, beyond which some of 255 registers are surely spilled.
_MOST_SUMS = 128
_SIDES: dict[str, tuple[int, ...]] = {
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (32, 64, 128, 256),
    "num_stages": (2, 3, 4, 5, 6),
    "num_warps": (4, 8, 16),
    "group_m": (1, 4, 16, 32),
}


class Found(NamedTuple):
    """The best tiles, and how long each product takes with them."""

    tiles: Tiles
    gate_up_us: float
    down_us: float


def may_run(tile: Tile, product: Product, precision: Precision) -> bool:
    """Whether a tile is worth compiling: it fits shared memory, registers and blocks of scales."""
    matrices, (activation, weight) = _MATRICES[product], _ITEM_BYTES[precision]
    rows, columns = tile.block_m * activation, matrices * tile.block_n * weight
    if tile.num_stages * (rows + columns) * tile.block_k > _SHARED_BYTES:
        return False
    sums = tile.block_m * tile.block_n * matrices / (32 * tile.num_warps)
    if weight == 1:
        if max(tile.block_n, tile.block_k) > 128:
            return False
        sums += tile.block_m * tile.block_n / (32 * tile.num_warps)  # of one block of scales
        if (product, precision) == ("gate_up", "w8a8") and tile.block_n != 128:
            return False
    return sums <= _MOST_SUMS


def neighbours(tile: Tile, side: str) -> Iterator[Tile]:
    """The tile with the next smaller, and the next larger value of a side."""
    values, value = _SIDES[side], getattr(tile, side)
    below, above = [v for v in values if v < value], [v for v in values if v > value]
    for other in [*below[-1:], *above[:1]]:
        yield tile._replace(**{side: other})


def descend(
    start: Tile, product: Product, precision: Precision, time_of: TimeOf
) -> tuple[Tile, float]:
    """The tile of which no neighbour that may run is faster, and its microseconds."""
    times = {start: time_of(product, start)}
    best, improved = start, True
    while improved:
        improved = False
        for side in _SIDES:
            for tile in neighbours(best, side):
                if tile not in times and may_run(tile, product, precision):
                    times[tile] = time_of(product, tile)
            fastest = min(times, key=times.__getitem__)
            improved |= fastest != best
            best = fastest
    return best, times[best]


def block_sizes(num_pairs: int, num_experts: int, precision: Precision) -> list[int]:
    """Of the rule, and next to it: larger blocks are fewer, smaller ones less empty."""
    rule = choose_block_m(num_pairs, min(num_pairs, num_experts), precision)
    return [size for size in (rule // 2, rule, rule * 2) if 16 <= size <= 128]


def search(
    num_pairs: int, sizes: tuple[int, int, int], precision: Precision, time_of: TimeOf
) -> Found:
    """The fastest tiles for that many pairs on experts of `sizes` (L, H, I).

    RuntimeError where no tile runs.
    """
    found = []
    by_the_rule = rule_tiles_for(num_pairs, sizes, precision)
    for block_m in block_sizes(num_pairs, sizes[0], precision):
        start = rule_tiles(block_m, *sizes[1:], precision)
        if block_m == by_the_rule.gate_up.block_m:
            start = by_the_rule
        gate_up, gate_up_us = descend(start.gate_up, "gate_up", precision, time_of)
        down, down_us = descend(start.down, "down", precision, time_of)
        found.append(Found(Tiles(gate_up, down), gate_up_us, down_us))
    best = min(found, key=lambda each: each.gate_up_us + each.down_us)
    if math.isinf(best.gate_up_us + best.down_us):
        raise RuntimeError(f"no tile runs for {num_pairs} pairs on experts of {sizes}, {precision}")
    return best
