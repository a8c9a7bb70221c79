"""Tables of tiles, one file for each kind of shard: which tiles for how many tokens.

A file names the experts held (E), the sizes H and I, the precision, and for a tuned one the device
and the minor version of Triton that it was measured with. A seed has neither: it is a guess, and
says from where. What counts for a tile is the number of pairs per expert, so a table also serves
shards that hold more or fewer experts of the same sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from expert_service.kernels.triton.tables.tiles import Precision, Tile, Tiles, rule_tiles_for

#: The tables that come with the package.
TABLES = Path(__file__).parent

# One size of element, one tile.
_SAME_TILES: dict[Precision, Precision] = {"fp16": "bf16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TileTable:
    """Tiles of a shard by number of tokens."""

    experts: int  # held
    hidden_size: int
    intermediate_size: int
    top_k: int  # pairs of each token, all held
    precision: Precision
    device: str | None  # as CUDA names it; None for a seed
    triton: str | None  # major.minor; None for a seed
    source: str  # "tuned ..." or "seed ...", and from where
    entries: tuple[tuple[int, Tiles], ...]  # (tokens, tiles), ascending
    tuned: tuple[int, ...] = ()  # the tokens whose tiles were measured; the others are a seed's

    def tiles(self, num_pairs: int, num_slots: int) -> Tiles:
        """Of the entry whose pairs per expert are nearest, as a ratio."""
        wanted = math.log(max(1, num_pairs) / max(1, num_slots))

        def distance(entry: tuple[int, Tiles]) -> float:
            return abs(math.log(entry[0] * self.top_k / self.experts) - wanted)

        return min(self.entries, key=distance)[1]

    @property
    def file_name(self) -> str:
        """Of the table's file."""
        shape = f"e{self.experts}_h{self.hidden_size}_i{self.intermediate_size}_{self.precision}"
        if self.device is None:
            return f"{shape}.seed.json"
        return f"{shape}.{self.device.lower().replace(' ', '_')}.triton{self.triton}.json"


def find_table(
    tables: Iterable[TileTable],
    sizes: tuple[int, int, int],
    precision: Precision,
    device: str,
    triton: str,
) -> TileTable | None:
    """The table to use for `sizes` (L, H, I), or None.

    Of H, I and the precision. First those tuned on this device, with this or else the newest
    Triton, and then seeds; of several, that of the nearest number of experts.
    """
    num_slots, hidden_size, size = sizes
    fitting = [
        table
        for table in tables
        if (table.hidden_size, table.intermediate_size) == (hidden_size, size)
        and table.precision == _SAME_TILES.get(precision, precision)
        and table.device in (device, None)
    ]

    def rank(table: TileTable) -> tuple[bool, bool, tuple[int, ...], float]:
        newest = tuple(-part for part in _version(table.triton))
        apart = abs(math.log(table.experts / max(1, num_slots)))
        return table.device is None, table.triton != triton, newest, apart

    return min(fitting, key=rank, default=None)


def choose_tiles(
    table: TileTable | None, num_pairs: int, sizes: tuple[int, int, int], precision: Precision
) -> Tiles:
    """Of the table, or of the rule where there is none, for `sizes` (L, H, I)."""
    if table is None:
        return rule_tiles_for(num_pairs, sizes, precision)
    return table.tiles(num_pairs, sizes[0])


def read_tables(folder: Path = TABLES) -> tuple[TileTable, ...]:
    """Every table of a folder. ValueError for a file that is none, by name."""
    return tuple(_read(path) for path in sorted(folder.glob("*.json")))


def write_table(table: TileTable, folder: Path) -> Path:
    """Writes a table to its file, of which it returns the path."""
    fields = [f'  "{name}": {json.dumps(getattr(table, name))}' for name in _FIELDS]
    head = "{\n" + ",\n".join(fields)
    rows = [
        f'    "{tokens}": {json.dumps({"gate_up": tiles.gate_up, "down": tiles.down})}'
        for tokens, tiles in table.entries
    ]
    columns = ", ".join(f'"{name}"' for name in Tile._fields)
    path = folder / table.file_name
    body = ",\n".join(rows)
    path.write_text(f'{head},\n  "tile": [{columns}],\n  "tokens": {{\n{body}\n  }}\n}}\n')
    return path


_FIELDS = tuple(name for name in TileTable.__slots__ if name != "entries")


def _read(path: Path) -> TileTable:
    try:
        fields = json.loads(path.read_text())
        entries = tuple(
            (int(tokens), Tiles(Tile(*tiles["gate_up"]), Tile(*tiles["down"])))
            for tokens, tiles in fields["tokens"].items()
        )
        head = {name: fields[name] for name in _FIELDS}
        table = TileTable(**head | {"tuned": tuple(fields["tuned"])}, entries=entries)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of tiles: {error!r}") from error
    _check(path, table)
    return table


def _check(path: Path, table: TileTable) -> None:
    counts = [tokens for tokens, _ in table.entries]
    if not counts or counts[0] < 1 or counts != sorted(set(counts)):
        raise ValueError(f"{path} has tiles for {counts} tokens; expected ascending numbers")
    if not set(table.tuned) <= set(counts):
        raise ValueError(f"{path} is tuned for {list(table.tuned)} tokens, and has {counts}")
    for tokens, (gate_up, down) in table.entries:
        if gate_up.block_m != down.block_m:
            raise ValueError(
                f"{path}: for {tokens} tokens, block_m is {gate_up.block_m} and {down.block_m}; "
                "expected one, that pairs are sorted by"
            )
    if path.name != table.file_name:
        raise ValueError(f"{path} holds the table {table.file_name}")


def _version(triton: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in triton.split(".")) if triton else ()
