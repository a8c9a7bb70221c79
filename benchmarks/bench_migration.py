"""What requests feel of experts that move: a layer served quietly, and while slots move.

python benchmarks/bench_migration.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch: threads that wait take no core

import torch
from harness import Report, Spread, WrongOutputError, output_options, quantile
from layer import LITE, QUICK, Shape, make_block, make_rows, save_block
from machine import facts
from services import Addresses, whole_cluster

import expertmesh
from fleet.control import migrate
from load_controller.planner import Move

_TOLERANCE = 1e-2  # bf16
_LAYER = 0
_TIMEOUT_S = 60.0
_AT_ONCE = 2  # slots that change places in one migration: each is a step of its own layer
_SAYS = """\
Controller, router and expert servers are processes of their own on one machine, without Ray; one
client sends one request after the other. `quiet` and `moving` blocks take turns. While a block is
`moving`, one migration follows the other without a break: each loads {at_once} experts (bf16, from
the checkpoint's file in the page cache), has their digests compared, switches the router, and drops
the old copies. `moved` is what was loaded in all moving blocks, by
their time. Every answer of every block is compared with transformers' block; none failed. `p99
ratio` is over all requests of all blocks, `blocks` the same block by block: median
(least–largest). Every process shares the cores, so that a server that reads takes them from those
that compute: on machines of their own they do not."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    shape: Shape
    servers: int
    tokens: int

    def __str__(self) -> str:
        size = f"{self.shape.expert_bytes / 2**20:.1f} MiB"
        return f"{self.servers} servers, experts of {size}, T = {self.tokens}"


_LARGE = replace(LITE, experts=16, shared=0)
_SMALL = replace(LITE, hidden=1024, intermediate=704, experts=32, shared=0)
CASES = (Case(_LARGE, 2, 1), Case(_LARGE, 4, 1), Case(_SMALL, 2, 1), Case(_SMALL, 2, 64))


@dataclass
class Moves:
    """Experts on their way from server to server and back, as long as it is entered."""

    addresses: Addresses
    servers: int
    experts: int
    slots: int = 0
    seconds: float = 0.0
    error: Exception | None = None
    _turn: count[int] = field(default_factory=count)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _since: float = 0.0

    def __enter__(self) -> Moves:
        self._end.clear()
        self._thread = threading.Thread(target=self._run)
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        assert self._thread is not None
        self._thread.join()
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                self.slots += migrate(self.addresses.controller, self._next()).loaded
        except Exception as error:
            self.error = error
        self.seconds += time.monotonic() - self._since

    def _next(self) -> list[Move]:
        """Some experts of one server go to the next one, or come back."""
        turn = next(self._turn)
        source = turn // 2 % self.servers
        target = (source + 1) % self.servers
        first = source * (self.experts // self.servers)
        if turn % 2:
            source, target = target, source
        return [
            Move(action, _LAYER, expert, f"shard-{server}")
            for expert in range(first, first + _AT_ONCE)
            for action, server in (("load", target), ("drop", source))
        ]


def _block(
    mesh: expertmesh.Mesh, rows: torch.Tensor, seconds: float
) -> list[tuple[float, torch.Tensor]]:
    """Milliseconds of each request of so long a time, with its answer."""
    answers = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        output = mesh.forward(rows, _LAYER, timeout=_TIMEOUT_S)
        answers.append((1e3 * (time.perf_counter() - start), output))
    return answers


def _measure(
    report: Report,
    case: Case,
    addresses: Addresses,
    block: torch.nn.Module,
    arguments: argparse.Namespace,
) -> None:
    rows = make_rows(case.shape, case.tokens, seed=case.tokens)
    expected = block(rows[None])[0]
    moves = Moves(addresses, case.servers, case.shape.experts)
    times: dict[str, list[list[float]]] = {"quiet": [], "moving": []}
    with expertmesh.connect(addresses.router) as mesh:
        with moves:  # once before: what a server does for the first time is not what is asked
            _block(mesh, rows, arguments.seconds / 2)
        warm, moves.slots, moves.seconds = moves.slots, 0, 0.0
        if not warm:
            raise WrongOutputError(f"{case}: nothing has moved")
        for _ in range(arguments.blocks):
            for side in times:
                if side == "moving":
                    with moves:
                        answers = _block(mesh, rows, arguments.seconds)
                else:
                    answers = _block(mesh, rows, arguments.seconds)
                for _, output in answers:
                    report.gate(str(case), output, expected, _TOLERANCE)
                times[side].append([ms for ms, _ in answers])
    _add(report, case, moves, times)


def _add(report: Report, case: Case, moves: Moves, times: dict[str, list[list[float]]]) -> None:
    whole = {side: [ms for block in blocks for ms in block] for side, blocks in times.items()}
    columns: dict[str, object] = {}
    for share in (0.5, 0.99):
        name = f"p{round(100 * share)}"
        found = {side: quantile(ms, share) for side, ms in whole.items()}
        columns |= {f"{side} {name} ms": round(ms, 2) for side, ms in found.items()}
        columns[f"{name} ratio"] = round(found["moving"] / found["quiet"], 2)
    pairs = zip(times["moving"], times["quiet"], strict=True)
    columns["blocks"] = Spread.of([quantile(m, 0.99) / quantile(q, 0.99) for m, q in pairs])
    columns |= {f"{side} longest ms": round(max(ms), 1) for side, ms in whole.items()}
    columns["moved MiB/s"] = round(moves.slots * case.shape.expert_bytes / 2**20 / moves.seconds, 1)
    columns["requests"] = " + ".join(str(len(ms)) for ms in whole.values())
    report.add(str(case), **columns)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4, help="of each side, in turn")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a block")
    parser.add_argument("--case", type=int, nargs="+", help=f"of {len(CASES)}, from 0; default all")
    output_options(parser)
    parser.add_argument("--quick", action="store_true", help="tiny experts: does it run at all?")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it, moves its experts, measures, and removes it."""
    arguments = _arguments()
    torch.set_num_threads(1)
    report = Report(
        theme="migration-quick" if arguments.quick else "migration",
        title="Requests while experts move, on the CPU",
        command=f"python benchmarks/bench_migration.py --blocks {arguments.blocks} --seconds "
        f"{arguments.seconds:g}{' --quick' * arguments.quick}",
        says="Experts as wide as DeepSeek-V2-Lite's, and half as wide; 6 of them a token.\n"
        + _SAYS.format(at_once=_AT_ONCE),
        facts=facts(),
    )
    cases = [CASES[index] for index in arguments.case or range(len(CASES))]
    for case in [Case(QUICK, 2, 1)] if arguments.quick else cases:
        block = make_block(case.shape)
        with tempfile.TemporaryDirectory() as name:
            save_block(block, Path(name))
            with whole_cluster(Path(name), Path(name), case.servers) as addresses:
                _measure(report, case, addresses, block, arguments)
    report.publish(arguments)


if __name__ == "__main__":
    main()
