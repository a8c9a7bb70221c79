"""Tile sizes of the grouped matrix products, from the number of pairs and experts.

    BM = clamp(pow2(2 * assignments / active experts), 16, largest)

Twice the mean load of an expert, so that one of uneven load still fits in few blocks: weights are
read once per block. The rule is a seed, from kernels that others tuned on an H200, and a table (see
`triton_tables`) comes before it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

#: What is multiplied: w8a16 are FP8 weights with 16-bit activations (or 32), w8a8 FP8 with FP8.
Precision = Literal["fp32", "fp16", "bf16", "w8a16", "w8a8"]

#: The smallest side of a tile that `tl.dot` takes.
_MIN_SIDE = 16
_MIN_SUMMED = 32  # of FP8 by FP8, which the others can do with, too
#: Of an H100 or H200.
_MULTIPROCESSORS = 132
#: Columns below which a program's loads are too small to hide their latency.
_NARROWEST = 32
#: Of narrowed tiles: what shared memory has room for beside 128 rows.
_MORE_STAGES = 2


class Tile(NamedTuple):
    """How one grouped matrix product is cut up."""

    block_m: int  # rows: sorted pairs of one expert
    block_n: int  # columns of the result; of the first product, of each of both matrices
    block_k: int  # elements of the sum taken at a time
    group_m: int  # blocks of rows that run side by side over one block of columns
    num_warps: int
    num_stages: int
    transposed: bool = False  # the result's transpose is computed: see `triton_weights`
    tma: bool = False  # weights come by the copy engine, where they are aligned for it


class Tiles(NamedTuple):
    """The tiles of both products, of one `block_m`: that is how pairs are sorted."""

    gate_up: Tile
    down: Tile


# By block_m. The first product computes two matrices at once: half the columns of each.
_32_BIT = {
    16: Tiles(Tile(16, 64, 64, 1, 4, 4), Tile(16, 128, 64, 1, 4, 4)),
    32: Tiles(Tile(32, 64, 64, 16, 4, 3), Tile(32, 128, 64, 16, 4, 3)),
    64: Tiles(Tile(64, 64, 32, 16, 4, 3), Tile(64, 128, 32, 16, 4, 3)),
    128: Tiles(Tile(128, 64, 32, 16, 8, 3), Tile(128, 128, 32, 16, 8, 3)),
}
_16_BIT = {
    16: Tiles(Tile(16, 64, 128, 1, 4, 4), Tile(16, 128, 128, 1, 4, 4)),
    32: Tiles(Tile(32, 64, 128, 16, 4, 3), Tile(32, 128, 128, 16, 4, 3)),
    64: Tiles(Tile(64, 64, 64, 16, 4, 3), Tile(64, 128, 64, 16, 4, 3)),
    128: Tiles(Tile(128, 128, 64, 16, 8, 4), Tile(128, 256, 64, 16, 8, 4)),
}
# At most one block of scales each way. 128 rows where there are enough: fewer programs widen the
# same weights.
_W8A16 = {
    16: Tiles(Tile(16, 64, 128, 1, 4, 4), Tile(16, 128, 128, 1, 4, 4)),
    32: Tiles(Tile(32, 64, 128, 16, 4, 4), Tile(32, 128, 128, 16, 4, 4)),
    64: Tiles(Tile(64, 64, 128, 16, 4, 3), Tile(64, 128, 128, 16, 4, 3)),
    128: Tiles(Tile(128, 64, 128, 16, 8, 3), Tile(128, 128, 128, 16, 8, 3)),
}
# 128 columns of h share a scale, so one program computes them. With 128 rows that takes every
# register there is, and more in Triton 3.9: for the tuner to try, and not chosen by the rule.
_W8A8 = {
    16: Tiles(Tile(16, 128, 128, 1, 4, 4), Tile(16, 128, 128, 1, 4, 4)),
    32: Tiles(Tile(32, 128, 128, 16, 8, 4), Tile(32, 128, 128, 16, 4, 4)),
    64: Tiles(Tile(64, 128, 128, 16, 8, 4), Tile(64, 128, 128, 16, 4, 4)),
    128: Tiles(Tile(128, 128, 128, 16, 16, 3), Tile(128, 128, 128, 16, 8, 4)),
}
_RULE: dict[Precision, dict[int, Tiles]] = {
    "fp32": _32_BIT,
    "fp16": _16_BIT,
    "bf16": _16_BIT,
    "w8a16": _W8A16,
    "w8a8": _W8A8,
}

_LARGEST: dict[Precision, int] = {"fp32": 128, "fp16": 128, "bf16": 128, "w8a16": 128, "w8a8": 64}


def choose_block_m(assignments: int, active_experts: int, precision: Precision) -> int:
    """Rows of a block, for that many (row, expert) pairs on that many experts."""
    mean_twice = -(-2 * assignments // max(1, active_experts))
    return min(max(next_power_of_2(mean_twice), _MIN_SIDE), _LARGEST[precision])


def rule_tiles(
    block_m: int, hidden_size: int, intermediate_size: int, precision: Precision
) -> Tiles:
    """Both tiles of that many rows, no larger than the matrices."""
    if block_m not in _RULE[precision]:
        raise ValueError(f"block_m is {block_m}; expected one of {list(_RULE[precision])}")
    gate_up, down = _RULE[precision][block_m]
    return Tiles(
        _fit(gate_up, intermediate_size, hidden_size),
        _fit(down, hidden_size, intermediate_size),
    )


def rule_tiles_for(num_pairs: int, sizes: tuple[int, int, int], precision: Precision) -> Tiles:
    """Both tiles for that many pairs, on experts of `sizes` (L, H, I).

    Where few pairs leave half of the multiprocessors idle, tiles get narrower. No sum changes:
    columns move to other programs.
    """
    num_slots, hidden_size, size = sizes
    active = min(num_pairs, num_slots)
    block_m = choose_block_m(num_pairs, active, precision)
    gate_up, down = rule_tiles(block_m, hidden_size, size, precision)
    blocks = max(1, active, num_pairs // block_m)
    if precision != "w8a8":  # whose programs compute 128 columns of h, or cannot round it
        gate_up = _narrow(gate_up, blocks, size)
    return Tiles(gate_up, _narrow(down, blocks, hidden_size))


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`; 1 for 0."""
    return 1 << max(0, value - 1).bit_length()


def _narrow(tile: Tile, blocks: int, columns: int) -> Tile:
    """Fewer columns, until there are programs for more than half of the multiprocessors.

    Each then loads further ahead: what is on its way from memory must not get less.
    """
    block_n = tile.block_n
    while block_n > _NARROWEST and 2 * blocks * -(-columns // block_n) <= _MULTIPROCESSORS:
        block_n //= 2
    num_stages = tile.num_stages + (_MORE_STAGES if block_n < tile.block_n else 0)
    return tile._replace(block_n=block_n, num_stages=num_stages)


def _fit(tile: Tile, columns: int, summed: int) -> Tile:
    """No larger than the matrices."""
    return tile._replace(
        block_n=min(tile.block_n, max(_MIN_SIDE, next_power_of_2(columns))),
        block_k=min(tile.block_k, max(_MIN_SUMMED, next_power_of_2(summed))),
    )
