"""Times tiles on this GPU, and writes them as the tables that servers read.

python benchmarks/tune_kernels.py [--only h7168_i2048] [--minutes 20] [--out FOLDER]

For each shard of the shipped tables: twelve numbers of tokens, evenly routed, all experts held.
A tile's output is compared with torch before it is timed; what differs is out. Times are of CUDA
graphs over several routings, so that weights come from memory and not from the cache. A table is
written after each number of tokens, with the seed's tiles for those to come: run again, and it goes
on with them.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources
from tuning import TOKENS, Product, search
from tuning_case import Case, make_matrices

from expert_service.kernels.triton_matrices import ExpertMatrices
from expert_service.kernels.triton_tables import TABLES, TileTable, read_tables, write_table
from expert_service.kernels.triton_tiles import Tile

_REPLAYS = 5


def graph_us(runs: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of one run, all of them after one another in a CUDA graph."""
    for run in runs:  # compiled before the capture
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(runs))
    return statistics.median(times)


def tune(
    table: TileTable,
    matrices: ExpertMatrices,
    dtype: torch.dtype,
    time_us: Callable[[Sequence[Callable[[], object]]], float],
    tokens: Sequence[int] = TOKENS,
) -> Iterator[TileTable]:
    """The table with one more number of tokens tuned, each time, until it has all.

    Activations are of `dtype`. Numbers that the table is tuned for are left alone.
    """
    sizes = (table.experts, table.hidden_size, table.intermediate_size)
    for count in (each for each in tokens if each not in table.tuned):
        case = Case(matrices, table, count, dtype)

        def time_of(product: Product, tile: Tile, case: Case = case) -> float:
            try:
                right = case.is_right(product, tile)
                return time_us(case.runs(product, tile)) if right else math.inf
            except OutOfResources:
                return math.inf

        found = search(count * table.top_k, sizes, table.precision, time_of)
        entries = sorted((dict(table.entries) | {count: found.tiles}).items())
        tuned = tuple(sorted((*table.tuned, count)))
        table = replace(table, entries=tuple(entries), tuned=tuned)
        print(
            f"{table.file_name} {count:5} tokens: {found.gate_up_us:8.1f} + {found.down_us:8.1f} us"
            f"  {tuple(found.tiles.gate_up)} {tuple(found.tiles.down)}",
            flush=True,
        )
        yield table


def tables_to_tune(
    shipped: Sequence[TileTable], written: Sequence[TileTable], device: str, version: str
) -> list[TileTable]:
    """For each seed, the table of this device and Triton: as far as it is written, or the seed's.

    `version` is all of Triton's; tables are for its minor.
    """
    minor = ".".join(version.split(".")[:2])
    source = f"tuned {datetime.date.today()} on {device} with Triton {version}"
    known = {table.file_name: table for table in written}
    seeds = [table for table in shipped if table.device is None]
    fresh = [replace(seed, device=device, triton=minor, source=source) for seed in seeds]
    return [known.get(table.file_name, table) for table in fresh]


def main() -> int:
    """Tunes until the time is over; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of tables, e.g. i2048_bf16")
    parser.add_argument("--minutes", type=float, default=20.0, help="no search starts later")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder for the tables")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning times kernels, and there is no CUDA device here", file=sys.stderr)
        return 2

    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    tables = tables_to_tune(
        read_tables(), read_tables(options.out), torch.cuda.get_device_name(), triton.__version__
    )
    for table in (each for each in tables if options.only in each.file_name):
        matrices = make_matrices(table, "cuda", torch.bfloat16)
        for tuned in tune(table, matrices, torch.bfloat16, graph_us):
            write_table(tuned, options.out)
            if time.monotonic() > end:
                print("time is over: run again to go on", flush=True)
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
