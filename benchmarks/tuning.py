"""Which tiles to try, and which of them to keep: the decisions of `tune_kernels.py`. Pure.

A descent for one product starts at one tile or a few, tries all that differ from the best in one
side, and then the sides that helped together, for as long as that makes it faster: tens of tiles
are compiled and timed, not all thousands. Both products are searched for each size of block near
the rule's, since they share it. A search says what it wants to know next and is told, so that
many can go on at the same time, and the compiler works on one while another is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from expert_service.kernels.triton.tables.tiles import (
    Precision,
    Tile,
    Tiles,
    choose_block_m,
    rule_tiles,
    rule_tiles_for,
)

Product = Literal["gate_up", "down"]
#: Tokens that a table has entries for; first those of the roofline, should time run out.
TOKENS = (128, 1024, 8192, 16, 1, 64, 256, 512, 32, 4, 8, 2)

_MATRICES: dict[Product, int] = {"gate_up": 2, "down": 1}
_ITEM_BYTES: dict[Precision, tuple[int, int]] = {  # of an activation and of a weight
    "fp32": (4, 4),
    "fp16": (2, 2),
    "bf16": (2, 2),
    "w8a16": (2, 1),
    "w8a8": (1, 1),
}
_WGMMA_ROWS = 64  # of the first operand, at least
_SHARED_BYTES = 227 * 1024
#: What a tile must be faster by to be preferred: less is noise, and a walk without an end.
_FASTER = 0.995
#: A size of block whose products are that much slower after a round is given up.
_HOPELESS = 1.25
#: Sums of a thread, beyond which some of 255 registers are surely spilled.
_MOST_SUMS = 128
_SIDES: dict[str, tuple[int, ...]] = {
    "block_n": (32, 64, 128, 256),
    "block_k": (64, 128),
    "num_stages": (2, 3, 4, 5, 6),
    "num_warps": (4, 8, 16),
    "group_m": (1, 4, 8, 16, 32, 64),
    "transposed": (False, True),
    "tma": (False, True),
}


class Found(NamedTuple):
    """The best tiles, and how long each product takes with them."""

    tiles: Tiles
    gate_up_us: float
    down_us: float

    def total_us(self) -> float:
        """Of both products."""
        return self.gate_up_us + self.down_us


def may_run(tile: Tile, product: Product, precision: Precision) -> bool:
    """Whether a tile is worth compiling: it fits shared memory, registers and blocks of scales."""
    matrices, (activation, weight) = _MATRICES[product], _ITEM_BYTES[precision]
    rows, columns = tile.block_m * activation, matrices * tile.block_n * weight
    if tile.num_stages * (rows + columns) * tile.block_k > _SHARED_BYTES:
        return False
    if tile.transposed and tile.block_n < _WGMMA_ROWS:
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


class Descent:
    """One product with one size of block: from its first tiles to one with no faster neighbour."""

    def __init__(self, starts: Iterable[Tile], product: Product, precision: Precision) -> None:
        self._product = product
        self._precision = precision
        self.times_us: dict[Tile, float] = {}
        starts = list(starts)
        may = [tile for tile in starts if may_run(tile, product, precision)]
        self._asked = dict.fromkeys([*starts[:1], *may])
        self.wanted = list(self._asked)  # yet to be told
        self._best: Tile | None = None

    @property
    def best(self) -> tuple[Tile | None, float]:
        """The tile to keep of those told so far, and its microseconds."""
        return self._best, self.times_us.get(self._best, math.inf) if self._best else math.inf

    def tell(self, tile: Tile, us: float) -> None:
        """Microseconds of a wanted tile; infinite where it does not run, or not right."""
        self.wanted.remove(tile)
        self.times_us[tile] = us
        if self.wanted:
            return
        before, known = self.best
        fastest = min(self.times_us, key=self.times_us.__getitem__)
        if self.times_us[fastest] < _FASTER * known:
            self._best = fastest
        if self._best is not None and self._best != before:
            self._ask(self._best, before)

    def _ask(self, best: Tile, before: Tile | None) -> None:
        candidates = [tile for side in _SIDES for tile in neighbours(best, side)]
        if before is not None:
            candidates.append(self._combined(before))
        for tile in candidates:
            if tile not in self._asked and may_run(tile, self._product, self._precision):
                self._asked[tile] = None
                self.wanted.append(tile)

    def _combined(self, before: Tile) -> Tile:
        """The tile with each side that alone made `before` faster."""
        combined = before
        for side in _SIDES:
            tried = [tile for tile in neighbours(before, side) if tile in self.times_us]
            fastest = min(tried, key=self.times_us.__getitem__, default=before)
            if self.times_us[fastest] < self.times_us[before]:
                combined = combined._replace(**{side: getattr(fastest, side)})
        return combined


class Search:
    """The fastest tiles for that many pairs on experts of `sizes` (L, H, I)."""

    def __init__(
        self,
        num_pairs: int,
        sizes: tuple[int, int, int],
        precision: Precision,
        known: Iterable[Tiles] = (),
    ) -> None:
        """Starts at the rule's tiles, and at those of `known`: others' or fewer tokens'."""
        self._what = f"{num_pairs} pairs on experts of {sizes}, {precision}"
        by_the_rule = rule_tiles_for(num_pairs, sizes, precision)
        self._descents: dict[int, dict[Product, Descent]] = {}
        for block_m in block_sizes(num_pairs, sizes[0], precision):
            starts = [by_the_rule, rule_tiles(block_m, *sizes[1:], precision), *known]
            fitting = [tiles for tiles in starts if tiles.gate_up.block_m == block_m]
            self._descents[block_m] = {
                "gate_up": Descent(_ways(tiles.gate_up for tiles in fitting), "gate_up", precision),
                "down": Descent(_ways(tiles.down for tiles in fitting), "down", precision),
            }

    def wanted(self) -> list[tuple[Product, Tile]]:
        """What is to be told next; empty once the search is over."""
        self._give_up_the_hopeless()
        return [
            (product, tile)
            for descents in self._descents.values()
            for product, descent in descents.items()
            for tile in descent.wanted
        ]

    def tell(self, product: Product, tile: Tile, us: float) -> None:
        """Microseconds of a wanted tile; infinite where it does not run, or not right."""
        if tile.block_m in self._descents:  # else it was given up meanwhile
            self._descents[tile.block_m][product].tell(tile, us)

    def best_us(self, product: Product, block_m: int) -> float:
        """Of that product with that size of block, so far; infinite where none has run."""
        if block_m not in self._descents:
            return math.inf
        return self._descents[block_m][product].best[1]

    def found(self) -> Found:
        """The best so far. RuntimeError where no tile ran."""
        found = [
            Found(Tiles(gate_up, down), gate_up_us, down_us)
            for descents in self._descents.values()
            for gate_up, gate_up_us in [descents["gate_up"].best]
            for down, down_us in [descents["down"].best]
            if gate_up is not None and down is not None
        ]
        if not found:
            raise RuntimeError(f"no tile runs for {self._what}")
        return min(found, key=Found.total_us)

    def _give_up_the_hopeless(self) -> None:
        totals = {
            block_m: sum(descent.best[1] for descent in descents.values())
            for block_m, descents in self._descents.items()
            if not any(descent.best[0] is None and descent.wanted for descent in descents.values())
        }
        best = min(totals.values(), default=math.inf)
        for block_m, total in totals.items():
            if total > _HOPELESS * best:
                del self._descents[block_m]


def _ways(tiles: Iterable[Tile]) -> Iterator[Tile]:
    """Each tile, and the ways to compute with it that are far from it in single steps."""
    for tile in tiles:
        yield tile
        yield tile._replace(tma=True)
        yield tile._replace(transposed=True, tma=True, block_n=max(tile.block_n, _WGMMA_ROWS))


def block_sizes(num_pairs: int, num_experts: int, precision: Precision) -> list[int]:
    """Of the rule, and next to it: larger blocks are fewer, smaller ones less empty."""
    rule = choose_block_m(num_pairs, min(num_pairs, num_experts), precision)
    return [size for size in (rule // 2, rule, rule * 2) if 16 <= size <= 128]
