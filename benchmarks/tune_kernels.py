"""Times tiles on this GPU, and writes them as the tables that servers read.

python benchmarks/tune_kernels.py [--only h7168_i2048] [--minutes 20] [--out FOLDER]

For each shard of the shipped tables: twelve numbers of tokens, evenly routed, all experts held.
A tile's output is compared with torch before it is timed; what differs is out. Times are of CUDA
graphs over several routings, so that weights come from memory and not from the cache. All tables
are searched together, one number of tokens after the other, so that the cores compile for one
while the GPU times another. Tables are written after each number, with the seed's tiles for those
to come: run again, and it goes on with them.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
from compiling import Compilers, idle_cores, target_here
from triton.runtime.errors import OutOfResources
from tuning import TOKENS, Product, Search
from tuning_case import Case, make_matrices

from expert_service.kernels.triton.matrices import ExpertMatrices
from expert_service.kernels.triton.tables.tables import TABLES, TileTable, read_tables, write_table
from expert_service.kernels.triton.tables.tiles import Tile, rule_tiles

Runs = Sequence[Callable[[], object]]
#: Microseconds of one run, all of them after one another; what is surely more than the number
#: given may be measured roughly.
TimeUs = Callable[[Runs, float], float]
#: Makes sure that a product of a table, for that many tokens, is compiled with a tile.
Compile = Callable[[TileTable, int, Product, Tile], "Future[None]"]

_REPLAYS = 5
_LAUNCH_US = 100.0  # that Python takes to launch a kernel, at most
_HOPELESS = 1.3  # times the best
_LONG_US = 20_000.0  # of one replay, after which two more say enough


def graph_us(runs: Runs, hopeless_us: float) -> float:
    """See TimeUs: the median of replays of a CUDA graph, or launches where these take too long."""

    def launch() -> None:
        for run in runs:
            run()

    launch()  # loads, and compiles if need be, before the capture
    launched_us = _event_us(launch) / len(runs)
    if launched_us > hopeless_us + _LAUNCH_US:
        return launched_us
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    times: list[float] = []
    while len(times) < (2 if times and times[0] > _LONG_US else _REPLAYS):
        times.append(_event_us(graph.replay))
    return statistics.median(times) / len(runs)


def _event_us(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


@dataclass(frozen=True)
class _Task:
    """One table's search for one number of tokens."""

    table: TileTable
    case: Case
    search: Search
    time_us: TimeUs

    def time_of(self, product: Product, tile: Tile) -> float:
        """Infinite where the tile does not run, or not right."""
        try:
            if not self.case.is_right(product, tile):
                return math.inf
            best_us = self.search.best_us(product, tile.block_m)
            return self.time_us(self.case.runs(product, tile), _HOPELESS * best_us)
        except OutOfResources:
            return math.inf


def tune(
    tables: Mapping[TileTable, ExpertMatrices],
    dtype: torch.dtype,
    time_us: TimeUs,
    compile_ahead: Compile,
    tokens: Sequence[int] = TOKENS,
    end: float = math.inf,
) -> Iterator[TileTable]:
    """Each table with one more number of tokens tuned, until all have all.

    Activations are of `dtype`. Numbers that a table is tuned for are left alone. At `end`, on
    the monotonic clock, searches that are not over are given up: what they have met so far may be
    worse than what the table has.
    """
    current = {table.file_name: table for table in tables}
    weights = {table.file_name: matrices for table, matrices in tables.items()}
    for count in tokens:
        tasks = [
            _Task(table, Case(weights[name], table, count, dtype), _search(table, count), time_us)
            for name, table in current.items()
            if count not in table.tuned
        ]
        _run(tasks, count, compile_ahead, end)
        for task in tasks:
            if task.search.wanted():
                continue
            table = current[task.table.file_name] = _with_entry(task, count)
            yield table
        if time.monotonic() > end:
            print("time is over: run again to go on", flush=True)
            return


def _search(table: TileTable, tokens: int) -> Search:
    """From the rule's tiles, the table's so far, and what the nearest numbers were tuned to."""
    sizes = (table.experts, table.hidden_size, table.intermediate_size)
    pairs = tokens * table.top_k
    tuned = [(count, tiles) for count, tiles in table.entries if count in table.tuned]
    tuned.sort(key=lambda entry: abs(math.log(entry[0] / tokens)))
    known = [table.tiles(pairs, table.experts), *(tiles for _, tiles in tuned[:2])]
    return Search(pairs, sizes, table.precision, known)


def _run(tasks: Sequence[_Task], tokens: int, compile_ahead: Compile, end: float) -> None:
    """All searches side by side: what is compiled is timed, in the order in which it is ready."""
    waiting: dict[Future[None], tuple[_Task, Product, Tile]] = {}
    asked: dict[int, set[tuple[Product, Tile]]] = {id(task): set() for task in tasks}

    def ask(task: _Task) -> None:
        for product, tile in task.search.wanted():
            if (product, tile) not in asked[id(task)]:
                asked[id(task)].add((product, tile))
                future = compile_ahead(task.table, tokens, product, tile)
                waiting[future] = (task, product, tile)

    for task in tasks:
        ask(task)
    while waiting and time.monotonic() < end:
        wait(waiting, return_when=FIRST_COMPLETED)
        for future in [each for each in waiting if each.done()]:
            task, product, tile = waiting.pop(future)
            compiled = future.exception() is None
            task.search.tell(product, tile, task.time_of(product, tile) if compiled else math.inf)
            ask(task)


def _with_entry(task: _Task, tokens: int) -> TileTable:
    found, table = task.search.found(), task.table
    entries = tuple(sorted((dict(table.entries) | {tokens: found.tiles}).items()))
    print(
        f"{table.file_name} {tokens:5} tokens: {found.gate_up_us:8.1f} + {found.down_us:8.1f} us"
        f"  {tuple(found.tiles.gate_up)} {tuple(found.tiles.down)}",
        flush=True,
    )
    return replace(table, entries=entries, tuned=tuple(sorted((*table.tuned, tokens))))


def _compile_product(
    compilers: Compilers, table: TileTable, tokens: int, product: Product, tile: Tile
) -> Future[None]:
    """Beside the rule's tile of the other product."""
    sizes = (table.experts, table.hidden_size, table.intermediate_size)
    tiles = rule_tiles(tile.block_m, *sizes[1:], table.precision)._replace(**{product: tile})
    return compilers.experts(sizes, table.top_k, table.precision, tokens, tiles)


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
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--out", type=Path, default=TABLES, help="folder for the tables")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning times kernels, and there is no CUDA device here", file=sys.stderr)
        return 2

    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    known = tables_to_tune(
        read_tables(), read_tables(options.out), torch.cuda.get_device_name(), triton.__version__
    )
    tables = {
        table: make_matrices(table, "cuda", torch.bfloat16)
        for table in known
        if options.only in table.file_name
    }
    with Compilers(idle_cores(), target_here()) as compilers:
        compile_ahead = partial(_compile_product, compilers)
        for tuned in tune(tables, torch.bfloat16, graph_us, compile_ahead, options.tokens, end):
            write_table(tuned, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
