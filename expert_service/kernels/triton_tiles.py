"""Tile sizes of the grouped matrix products, from the number of pairs and experts.

    BM = clamp(pow2(2 * assignments / active experts), 16, 128)

Twice the mean load of an expert, so that one of uneven load still fits in few blocks: weights are
read once per block. No GPU was at hand when this was written: the table is a seed from kernels
that others tuned on an H200, and a tuned table comes before it.
"""

from __future__ import annotations

from typing import NamedTuple

#: The smallest side of a tile that `tl.dot` takes.
_MIN_SIDE = 16
_MAX_BLOCK_M = 128
#: Bytes of one element that `_TILES` is written for; `block_k` shrinks for wider ones.
_TABLE_ITEM_BYTES = 2


class Tile(NamedTuple):
    """How one grouped matrix product is cut up."""

    block_m: int  # rows: sorted pairs of one expert
    block_n: int  # columns of the result
    block_k: int  # elements of the sum taken at a time
    group_m: int  # blocks of rows that run side by side over one block of columns
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tiles of both products, of one `block_m`."""

    gate_up: Tile  # `block_n` columns of the gate's result, and as many of up's
    down: Tile


#: By block_m, for 16-bit weights. `block_n` counts all columns that a program computes.
_TILES = {
    16: Tile(16, 128, 128, 1, 4, 4),
    32: Tile(32, 128, 128, 16, 4, 3),
    64: Tile(64, 128, 64, 16, 4, 3),
    128: Tile(128, 256, 64, 16, 8, 4),
}


def choose_block_m(assignments: int, active_experts: int) -> int:
    """Rows of a block, for that many (row, expert) pairs on that many experts."""
    mean_twice = -(-2 * assignments // max(1, active_experts))
    return min(max(next_power_of_2(mean_twice), _MIN_SIDE), _MAX_BLOCK_M)


def gate_up_tile(block_m: int, hidden_size: int, intermediate_size: int, item_bytes: int) -> Tile:
    """The tile of the first product: each program computes `block_n` columns of both matrices."""
    tile = _TILES[block_m]
    return _fit(
        tile._replace(block_n=tile.block_n // 2), intermediate_size, hidden_size, item_bytes
    )


def down_tile(block_m: int, hidden_size: int, intermediate_size: int, item_bytes: int) -> Tile:
    """The tile of the second product."""
    return _fit(_TILES[block_m], hidden_size, intermediate_size, item_bytes)


def rule_tiles(block_m: int, hidden_size: int, intermediate_size: int, item_bytes: int) -> Tiles:
    """Both tiles, for weights whose elements have that many bytes."""
    sizes = (block_m, hidden_size, intermediate_size, item_bytes)
    return Tiles(gate_up_tile(*sizes), down_tile(*sizes))


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`; 1 for 0."""
    return 1 << max(0, value - 1).bit_length()


def _fit(tile: Tile, columns: int, summed: int, item_bytes: int) -> Tile:
    """No larger than the matrices, and as many bytes as the table's tile."""
    block_k = tile.block_k * _TABLE_ITEM_BYTES // max(item_bytes, _TABLE_ITEM_BYTES)
    return tile._replace(
        block_n=min(tile.block_n, max(_MIN_SIDE, next_power_of_2(columns))),
        block_k=min(block_k, max(_MIN_SIDE, next_power_of_2(summed))),
    )
