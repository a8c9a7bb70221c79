"""Which tiles a device uses: those of its tables, or the rule's where no table fits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import triton

from expert_service.kernels.triton.tables.tables import (
    TileTable,
    choose_tiles,
    find_table,
    read_tables,
)
from expert_service.kernels.triton.tables.tiles import Precision, Tiles


class TileChoice:
    """Looks tiles up for one device and this version of Triton; remembers what it found."""

    def __init__(self, chip: str, tables: Sequence[TileTable] | None = None) -> None:
        """`chip` as CUDA names it; `tables` are those of the package unless given."""
        self._chip = chip
        self._triton = ".".join(triton.__version__.split(".")[:2])
        self._tables = read_tables() if tables is None else tables
        self.tiles = lru_cache(maxsize=1 << 16)(self._tiles)
        self.table = lru_cache(self._table)

    def _tiles(self, num_pairs: int, sizes: tuple[int, int, int], precision: Precision) -> Tiles:
        """For that many pairs on experts of `sizes` (L, H, I)."""
        return choose_tiles(self.table(sizes, precision), num_pairs, sizes, precision)

    def _table(self, sizes: tuple[int, int, int], precision: Precision) -> TileTable | None:
        """The table that `tiles` asks, or None where it asks the rule."""
        return find_table(self._tables, sizes, precision, self._chip, self._triton)
