"""`scripts/check_sm90.py`: kernels compiled for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from expert_service.kernels.triton.tables.tables import TileTable, read_tables, write_table
from expert_service.kernels.triton.tables.tiles import Tile, Tiles
from scripts.check_sm90 import Launch, Outcome, faults, pick

ROOT = Path(__file__).parents[2]

LAUNCH = Launch(
    kernel="gate_up",
    signature=(("gate_ptr", "*bf16"),),
    constants=(("BLOCK_M", 64), ("BLOCK_N", 64), ("BLOCK_K", 64)),
    divisible=(),
    num_warps=4,
    num_stages=3,
)
# 128 threads load 2 KiB at once: three stages of two tiles of 8 KiB are 24 loads.
GOOD = Outcome(
    registers=128,
    spilled=0,
    shared=227 * 1024,
    wgmma=True,
    wide_loads=24,
    narrow_copies=0,
    bulk_copies=0,
)


def _check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "scripts/check_sm90.py", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_four_configurations_of_each_kernel_compile_without_fault() -> None:
    done = _check("--limit", "4")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("configurations compiled for sm_90, 0 faulty\n")


def test_a_tile_that_spills_is_found(tmp_path: Path) -> None:
    tile = Tile(128, 256, 64, 1, 4, 3)  # 512 sums for each thread, of 255 registers
    table = TileTable(
        experts=8,
        hidden_size=256,
        intermediate_size=256,
        top_k=1,
        precision="bf16",
        device=None,
        triton=None,
        source="seed of a test",
        entries=((8, Tiles(tile, tile)),),
    )
    write_table(table, tmp_path)

    done = _check("--tables", str(tmp_path), "--limit", "1")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "gate_up bf16 128x256x64: spills " in done.stdout


def test_the_interpreter_is_refused() -> None:
    done = _check(TRITON_INTERPRET="1")

    assert done.returncode == 2
    assert "unset it" in done.stderr


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"spilled": 8}, ["spills 8 bytes a thread"]),
        ({"shared": 227 * 1024 + 1}, ["232449 bytes of shared memory, of 232448"]),
        ({"wgmma": False}, ["no wgmma"]),
        ({"wide_loads": 23}, ["weights are not loaded 16 bytes at a time"]),
        ({"narrow_copies": 1}, ["weights are not loaded 16 bytes at a time"]),
    ],
    ids=str,
)
def test_each_fault_is_named(change: dict[str, int], found: list[str]) -> None:
    assert faults(LAUNCH, replace(GOOD, **change)) == found


def test_a_tile_by_the_copy_engine_has_to_use_it_and_needs_no_wide_loads() -> None:
    launch = replace(LAUNCH, constants=(*LAUNCH.constants, ("TMA", True)))

    assert faults(launch, replace(GOOD, wide_loads=0, bulk_copies=8)) == []
    assert faults(launch, GOOD) == ["nothing comes by the copy engine"]


def test_small_tiles_need_no_wgmma_and_other_kernels_have_no_weights() -> None:
    small = replace(LAUNCH, constants=(("BLOCK_M", 32), *LAUNCH.constants[1:]))

    assert faults(small, replace(GOOD, wgmma=False)) == []
    assert faults(replace(LAUNCH, kernel="reduce"), replace(GOOD, wgmma=False, wide_loads=0)) == []


def test_a_few_of_each_kernel_are_the_largest_of_each_precision_in_turn() -> None:
    wide = replace(LAUNCH, constants=(("BLOCK_M", 64), ("BLOCK_N", 128), ("BLOCK_K", 64)))
    fp8 = replace(LAUNCH, signature=(("gate_ptr", "*fp8e4nv"),))
    reduce = replace(LAUNCH, kernel="reduce")

    assert pick([LAUNCH, wide, fp8, reduce], 2) == [wide, fp8, reduce]
    assert pick([LAUNCH, wide, fp8, reduce], 3) == [wide, fp8, LAUNCH, reduce]
    assert pick([LAUNCH, wide, fp8, reduce], 0) == [LAUNCH, wide, fp8, reduce]


def test_the_committed_report_holds_every_tile_of_the_shipped_tables() -> None:
    newest = max((ROOT / "benchmarks" / "results").glob("sm90_*.json"))
    names = ("kernel", "precision", "H x I", "block", "warps", "stages", "faults")
    rows = json.loads(newest.read_text())["configurations"]
    reported = {tuple(row[name] for name in names) for row in rows}

    wanted = {
        (
            kernel,
            table.precision,
            f"{table.hidden_size}x{table.intermediate_size}",
            f"{tile.block_m}x{tile.block_n}x{tile.block_k}",
            tile.num_warps,
            tile.num_stages,
            "none",
        )
        for table in read_tables()
        for _, tiles in table.entries
        for kernel, tile in zip(("gate_up", "down"), tiles, strict=True)
    }
    assert wanted <= reported, wanted - reported
