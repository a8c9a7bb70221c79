"""What the tuner decides, and that it times nothing which is wrong; no GPU is needed to test it."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.tuning import Descent, Found, Product, Search, block_sizes, may_run, neighbours
from benchmarks.tuning_case import Case, make_matrices
from expert_service.kernels.triton.tables.tables import TileTable, read_tables, write_table
from expert_service.kernels.triton.tables.tiles import (
    Precision,
    Tile,
    Tiles,
    rule_tiles,
    rule_tiles_for,
)
from tests.kernels.triton_cases import DEVICE

SIZES = (8, 7168, 2048)
START = Tile(16, 64, 128, 1, 4, 4)


def _shard(precision: Precision) -> TileTable:
    """A small shard, of a device that nobody has."""
    tiles = rule_tiles(16, 40, 24, precision)
    return TileTable(
        experts=4,
        hidden_size=40,
        intermediate_size=24,
        top_k=2,
        precision=precision,
        device="TEST",
        triton="0.0",
        source="tuned by a test",
        entries=((1, tiles),),
        tuned=(1,),
    )


@pytest.fixture
def tune_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("tune_kernels")


def _descend(time_of: Callable[[Tile], float], *starts: Tile) -> tuple[Descent, list[Tile]]:
    """A descent that was told all it wanted, and the tiles in the order that it wanted them."""
    descent, told = Descent(starts or (START,), "down", "bf16"), list[Tile]()
    while descent.wanted:
        told.append(descent.wanted[0])
        descent.tell(told[-1], time_of(told[-1]))
    return descent, told


def _search(search: Search, time_of: Callable[[Product, Tile], float]) -> Found:
    while wanted := search.wanted():
        for product, tile in wanted:
            search.tell(product, tile, time_of(product, tile))
    return search.found()


def test_a_descent_ends_at_the_fastest_tile_that_single_steps_reach() -> None:
    best = Tile(16, 32, 64, 4, 8, 3)

    def time_of(tile: Tile) -> float:
        return 1.0 + sum(abs(math.log2((a + 1) / (b + 1))) for a, b in zip(tile, best, strict=True))

    descent, _ = _descend(time_of)

    assert descent.best == (best, 1.0)


def test_sides_that_help_alone_are_taken_together() -> None:
    """Two rounds instead of one for each side."""
    best = Tile(16, 32, 64, 4, 8, 3)

    def time_of(tile: Tile) -> float:
        return 1.0 + sum(a != b for a, b in zip(tile, best, strict=True))

    _, told = _descend(time_of)

    assert best in told[: 1 + 2 * 10 + 1]


def test_a_tile_is_timed_once() -> None:
    descent, told = _descend(lambda _tile: 1.0)

    assert descent.best == (START, 1.0)
    assert len(told) == len(set(told)) == 10  # itself, and what is next to it on seven sides


def test_a_difference_that_may_be_noise_moves_nothing() -> None:
    descent, told = _descend(lambda tile: 1.0 if tile == START else 0.997)

    assert descent.best == (START, 1.0)
    assert len(told) == 10


def test_a_descent_goes_on_from_the_fastest_of_its_starts() -> None:
    other = START._replace(block_n=32)
    descent, told = _descend(lambda tile: 1.0 + (tile.block_n != 32), START, other)

    assert told[:2] == [START, other]
    assert descent.best == (other, 1.0)


def test_a_tile_that_does_not_run_is_left_for_one_that_does() -> None:
    start = START._replace(num_stages=3)
    descent, _ = _descend(lambda tile: math.inf if tile.num_stages > 3 else 5.0, START, start)

    assert descent.best == (start, 5.0)


def test_the_neighbours_of_an_end_are_one() -> None:
    assert [tile.block_n for tile in neighbours(START, "block_n")] == [32, 128]
    assert [tile.num_warps for tile in neighbours(START, "num_warps")] == [8]
    assert [tile.group_m for tile in neighbours(START, "group_m")] == [4]


@pytest.mark.parametrize(
    ("tile", "product", "precision", "allowed"),
    [
        (Tile(128, 256, 64, 16, 8, 4), "down", "bf16", True),
        (Tile(128, 256, 64, 16, 8, 5), "down", "bf16", False),  # 240 KiB
        (Tile(128, 256, 64, 16, 4, 3), "down", "bf16", False),  # 256 sums a thread
        (Tile(128, 128, 64, 16, 8, 4), "gate_up", "bf16", True),
        (Tile(128, 256, 64, 16, 8, 2), "gate_up", "bf16", False),
        (Tile(16, 128, 128, 1, 4, 4), "down", "w8a16", True),
        (Tile(16, 256, 128, 1, 4, 4), "down", "w8a16", False),  # two scales across
        (Tile(16, 128, 256, 1, 4, 2), "down", "w8a16", False),  # two scales down
        (Tile(64, 128, 128, 16, 4, 4), "gate_up", "w8a8", False),  # 192 with one block's
        (Tile(64, 128, 128, 16, 8, 4), "gate_up", "w8a8", True),
        (Tile(64, 64, 128, 16, 8, 4), "gate_up", "w8a8", False),  # half of what shares a scale
    ],
    ids=str,
)
def test_what_cannot_run_well_is_not_tried(
    tile: Tile, product: str, precision: Precision, allowed: bool
) -> None:
    assert may_run(tile, product, precision) == allowed


@pytest.mark.parametrize("precision", ["bf16", "w8a16", "w8a8"])
def test_a_search_starts_where_tiles_may_run(precision: Precision) -> None:
    for block_m in block_sizes(512, 8, precision):
        tiles = rule_tiles(block_m, *SIZES[1:], precision)
        assert may_run(tiles.gate_up, "gate_up", precision)
        assert may_run(tiles.down, "down", precision)


@pytest.mark.parametrize(
    ("num_pairs", "precision", "sizes"),
    [
        (8, "bf16", [16, 32]),
        (128, "bf16", [16, 32, 64]),
        (65536, "bf16", [64, 128]),
        (65536, "w8a16", [64, 128]),
        (65536, "w8a8", [32, 64, 128]),
    ],
)
def test_blocks_next_to_the_rules_are_tried(
    num_pairs: int, precision: Precision, sizes: list[int]
) -> None:
    assert block_sizes(num_pairs, 8, precision) == sizes


def test_both_products_share_the_block_that_is_best_for_their_sum() -> None:
    """32 rows are best for the first product, 64 for the second, by more."""
    times = {"gate_up": {16: 4.0, 32: 1.0, 64: 2.0}, "down": {16: 4.0, 32: 4.5, 64: 3.0}}

    found = _search(Search(128, SIZES, "bf16"), lambda product, tile: times[product][tile.block_m])

    assert (found.tiles.gate_up.block_m, found.tiles.down.block_m) == (64, 64)
    assert (found.gate_up_us, found.down_us) == (2.0, 3.0)


def test_a_size_of_block_that_is_far_slower_is_not_searched_further() -> None:
    asked: list[int] = []

    def time_of(_product: Product, tile: Tile) -> float:
        asked.append(tile.block_m)
        return 1.0 if tile.block_m == 32 else 1.3

    found = _search(Search(128, SIZES, "bf16"), time_of)

    assert found.total_us() == 2.0
    assert asked.count(16) <= 12  # the first tiles of both products
    assert asked.count(32) > 20


def test_tiles_that_others_found_are_tried_first() -> None:
    known = Tiles(Tile(32, 32, 64, 4, 8, 5), Tile(32, 32, 64, 4, 8, 5))

    wanted = Search(128, SIZES, "bf16", [known]).wanted()

    assert {("gate_up", known.gate_up), ("down", known.down)} <= set(wanted)


def test_a_search_in_which_nothing_runs_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no tile runs for 8 pairs"):
        _search(Search(8, SIZES, "bf16"), lambda _product, _tile: math.inf)


def _nothing_to_compile(*_: object) -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_a_table_is_tuned_with_what_is_right(
    precision: Precision, tune_kernels: ModuleType
) -> None:
    """Real kernels, and a clock by which all tiles are as fast: the first are kept."""
    table, dtype = replace(_shard(precision), tuned=()), torch.float32
    matrices = make_matrices(table, DEVICE, dtype)
    outputs: list[int] = []

    def time_us(runs: Sequence[Callable[[], torch.Tensor]], _hopeless_us: float) -> float:
        outputs.append(runs[0]().shape[1])
        return 1.0

    *_, tuned = tune_kernels.tune(
        {table: matrices}, dtype, time_us, _nothing_to_compile, tokens=(1, 3)
    )

    assert tuned.tuned == (1, 3)
    assert [tokens for tokens, _ in tuned.entries] == [1, 3]
    assert dict(tuned.entries)[1] == rule_tiles_for(2, (4, 40, 24), precision)
    assert set(outputs) == {24, 40}


def test_a_tile_that_does_not_compile_is_not_run(tune_kernels: ModuleType) -> None:
    table = replace(_shard("fp32"), tuned=())
    matrices = make_matrices(table, DEVICE, torch.float32)
    refused: list[Tile] = []

    def compile_ahead(_table: object, _tokens: int, product: Product, tile: Tile) -> Future[None]:
        future = _nothing_to_compile()
        if product == "down" and not refused:
            refused.append(tile)
            future = Future()
            future.set_exception(RuntimeError("does not compile"))
        return future

    *_, tuned = tune_kernels.tune(
        {table: matrices},
        torch.float32,
        lambda _runs, _hopeless_us: 1.0,
        compile_ahead,
        tokens=(8,),
    )

    assert dict(tuned.entries)[8].down not in refused


def test_no_search_begins_once_the_time_is_over(tune_kernels: ModuleType) -> None:
    table = replace(_shard("fp32"), tuned=())
    matrices = make_matrices(table, DEVICE, torch.float32)

    tuned = tune_kernels.tune(
        {table: matrices},
        torch.float32,
        lambda _runs, _hopeless_us: 1.0,
        _nothing_to_compile,
        (1,),
        end=0.0,
    )

    assert list(tuned) == []


_COMPILE = """
import sys
from compiling import Compilers, GPUTarget
from expert_service.kernels.triton.tables.tables import read_tables

if __name__ == "__main__":
    table = read_tables()[0]
    shard = (table.experts, table.hidden_size, table.intermediate_size), table.top_k
    with Compilers(1, GPUTarget("cuda", 90, 32)) as compilers:
        for tokens, tiles in table.entries[: int(sys.argv[1])]:
            compilers.experts(*shard, table.precision, tokens, tiles).result()
"""


def test_what_a_worker_compiles_is_in_the_cache_for_others(tmp_path: Path) -> None:
    """Compiled for a chip that is not here, as often as it is new."""
    script, cache, root = tmp_path / "compile.py", tmp_path / "cache", Path(__file__).parents[2]
    script.write_text(_COMPILE)
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{root}:{root / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}",
        "TRITON_CACHE_DIR": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
    }
    entries = []
    for count in ("1", "1", "2"):
        command = [sys.executable, str(script), count]
        subprocess.run(command, env=environment, check=True, timeout=120)
        entries.append({path.name for path in cache.iterdir()})

    assert entries[0] == entries[1]
    assert entries[0] < entries[2]


@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_a_wrong_result_is_noticed(product: str) -> None:
    table = _shard("fp32")
    matrices = make_matrices(table, DEVICE, torch.float32)
    case, tile = Case(matrices, table, 9, torch.float32), Tile(16, 16, 32, 1, 4, 2)
    right = case.is_right(product, tile)

    for matrix in (matrices.up_LIH, matrices.down_LHI):
        matrix[2].mul_(1.2)

    assert (right, case.is_right(product, tile)) == (True, False)


def test_tuning_goes_on_where_it_was_left(tune_kernels: ModuleType) -> None:
    tuned = [_shard("bf16"), _shard("fp32")]
    shipped = [replace(each, device=None, triton=None, tuned=()) for each in tuned]
    begun = replace(tuned[1], device="NVIDIA H200", triton="3.7")

    tables = tune_kernels.tables_to_tune(shipped, [begun], "NVIDIA H200", "3.7.1")

    assert [table.file_name for table in tables] == [
        "e4_h40_i24_bf16.nvidia_h200.triton3.7.json",
        "e4_h40_i24_fp32.nvidia_h200.triton3.7.json",
    ]
    assert tables[0].source.startswith("tuned ")
    assert tables[0].source.endswith(" on NVIDIA H200 with Triton 3.7.1")
    assert (tables[0].tuned, tables[1]) == ((), begun)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes for minutes where there is a GPU")
def test_without_a_gpu_nothing_is_tuned(
    tune_kernels: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--out", str(tmp_path)])

    assert tune_kernels.main() == 2
    assert "there is no CUDA device here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_tuned_can_be_read_back(tmp_path: Path) -> None:
    table = _shard("bf16")
    write_table(table, tmp_path)

    assert read_tables(tmp_path) == (table,)
