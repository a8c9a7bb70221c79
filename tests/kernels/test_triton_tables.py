"""The tables of tiles: those that ship, how they are found, and files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from expert_service.kernels.triton.tables.tables import (
    TileTable,
    choose_tiles,
    find_table,
    read_tables,
    write_table,
)
from expert_service.kernels.triton.tables.tiles import Precision, Tile, Tiles, rule_tiles_for

SHIPPED = read_tables()
SHARDS = [
    (8, 7168, 2048, 8, "bf16"),
    (8, 7168, 2048, 8, "w8a16"),
    (8, 7168, 2048, 8, "w8a8"),
    (128, 2048, 768, 8, "bf16"),
    (64, 2048, 1408, 6, "bf16"),
    (8, 4096, 14336, 2, "bf16"),
]


def _tiles(block_m: int) -> Tiles:
    tile = Tile(block_m, 64, 64, 1, 4, 3)
    return Tiles(tile, tile)


SEED = TileTable(
    experts=8,
    hidden_size=64,
    intermediate_size=32,
    top_k=2,
    precision="bf16",
    device=None,
    triton=None,
    source="seed for a test",
    entries=((1, _tiles(16)), (16, _tiles(32)), (256, _tiles(64))),
)
TUNED = replace(SEED, device="NVIDIA H200", triton="3.7", source="tuned for a test", tuned=(1, 256))


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_each_shard_of_the_roofline_has_a_table_of_twelve_token_counts(
    shard: tuple[int, int, int, int, Precision],
) -> None:
    found = [
        table
        for table in SHIPPED
        if (table.experts, table.hidden_size, table.intermediate_size) == shard[:3]
        and (table.top_k, table.precision) == shard[3:]
    ]

    assert [len(table.entries) for table in found] == [12] * len(found) != []


@pytest.mark.parametrize("table", SHIPPED, ids=lambda table: table.file_name)
def test_a_shipped_table_says_whether_it_is_a_seed(table: TileTable) -> None:
    kind = "seed, not measured" if table.device is None else "tuned"

    assert table.source.startswith(kind)
    assert bool(table.tuned) == (kind == "tuned")


@pytest.mark.parametrize("table", SHIPPED, ids=lambda table: table.file_name)
def test_a_shipped_tile_of_fp8_weights_lies_within_one_block_of_scales(table: TileTable) -> None:
    if table.precision in ("w8a16", "w8a8"):
        tiles = [tile for _, both in table.entries for tile in both]
        assert all(128 % tile.block_n == 0 == 128 % tile.block_k for tile in tiles)
    if table.precision == "w8a8":
        assert {both.gate_up.block_n for _, both in table.entries} == {128}


@pytest.mark.parametrize(
    ("num_pairs", "num_slots", "block_m"),
    [
        (0, 8, 16),
        (2, 8, 16),
        (7, 8, 16),
        (9, 8, 32),  # the middle of 2 and 32 pairs, as a ratio, is 8
        (32, 8, 32),
        (10**6, 8, 64),
        (32, 4, 32),
        (32 * 16, 128, 32),  # as many pairs per expert
        (32, 128, 16),
    ],
)
def test_the_entry_of_the_nearest_number_of_pairs_per_expert_is_taken(
    num_pairs: int, num_slots: int, block_m: int
) -> None:
    assert SEED.tiles(num_pairs, num_slots) == _tiles(block_m)


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_a_tuned_table_is_found_on_its_own_device_only(device: str) -> None:
    found = find_table([SEED, TUNED], (8, 64, 32), "bf16", device, "3.7")

    assert found is (TUNED if device == "NVIDIA H200" else SEED)


@pytest.mark.parametrize(("triton", "found"), [("3.6", "3.6"), ("3.8", "3.10"), ("3.10", "3.10")])
def test_a_table_of_the_same_triton_is_found_or_else_the_newest(triton: str, found: str) -> None:
    tables = [replace(TUNED, triton=version) for version in ("3.9", "3.6", "3.10")]

    table = find_table([SEED, *tables], (8, 64, 32), "bf16", "NVIDIA H200", triton)

    assert table is not None
    assert table.triton == found


def test_of_several_tables_the_nearest_number_of_experts_is_found() -> None:
    tables = [replace(SEED, experts=count) for count in (8, 64, 128)]

    found = [find_table(tables, (count, 64, 32), "bf16", "any", "3.7") for count in (1, 30, 200)]

    assert [table.experts for table in found if table] == [8, 64, 128]


@pytest.mark.parametrize(
    ("sizes", "precision"), [((8, 65, 32), "bf16"), ((8, 64, 33), "bf16"), ((8, 64, 32), "w8a16")]
)
def test_other_sizes_and_precisions_have_no_table_but_the_rule(
    sizes: tuple[int, int, int], precision: Precision
) -> None:
    table = find_table([SEED], sizes, precision, "any", "3.7")

    assert table is None
    assert choose_tiles(table, 40, sizes, precision) == rule_tiles_for(40, sizes, precision)


def test_fp16_takes_the_tiles_of_bf16() -> None:
    table = find_table([SEED], (8, 64, 32), "fp16", "any", "3.7")

    assert choose_tiles(table, 2, (8, 64, 32), "fp16") == _tiles(16)


@pytest.mark.parametrize("table", [SEED, TUNED], ids=["seed", "tuned"])
def test_a_table_that_is_written_is_read_back(table: TileTable, tmp_path: Path) -> None:
    path = write_table(table, tmp_path)

    assert path.name == table.file_name
    assert read_tables(tmp_path) == (table,)


def test_file_names_say_what_a_table_is_for() -> None:
    assert SEED.file_name == "e8_h64_i32_bf16.seed.json"
    assert TUNED.file_name == "e8_h64_i32_bf16.nvidia_h200.triton3.7.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": {}}, "has tiles for"),
        ({"tokens": {"0": {"gate_up": [16] * 6, "down": [16] * 6}}}, "expected ascending numbers"),
        ({"tokens": {"1": {"gate_up": [16] * 6, "down": [32] * 6}}}, "block_m is 16 and 32"),
        ({"tokens": {"1": {"gate_up": [16] * 5, "down": [16] * 6}}}, "no table of tiles"),
        ({"tokens": {"one": {}}}, "no table of tiles"),
        ({"tuned": [2]}, r"tuned for \[2\] tokens, and has \[1, 16, 256\]"),
        ({"experts": 9}, "holds the table e9_h64_i32_bf16.seed.json"),
    ],
    ids=str,
)
def test_a_file_that_is_no_table_is_refused_by_name(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_table(SEED, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(ValueError, match=message) as refusal:
        read_tables(tmp_path)

    assert str(path) in str(refusal.value)


def test_a_file_without_a_field_is_refused(tmp_path: Path) -> None:
    path = write_table(SEED, tmp_path)
    fields = json.loads(path.read_text())
    del fields["source"]
    path.write_text(json.dumps(fields))

    with pytest.raises(ValueError, match="no table of tiles: KeyError"):
        read_tables(tmp_path)
