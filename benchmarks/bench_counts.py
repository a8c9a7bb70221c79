"""What counting costs, and sampling for the divergence meter: one layer with and without.

python benchmarks/bench_counts.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch: threads that wait take no core
sys.path.insert(0, str(Path(__file__).parents[1]))  # the cluster in one process is the tests' own

import torch
from harness import Interval, Report, Spread, interleave, output_options
from layer import LITE, QUICK, make_block, make_rows, save_block
from machine import facts

import expertmesh
from expert_service import shard
from expertmesh import BalanceConfig
from tests.mesh import LocalMesh, local_mesh

TOLERANCE = 1e-2  # bf16
#: One after the other in a block: a quarter of a second or so. Short blocks in many rounds tell two
#: percent apart where few long ones do not: a disturbance of the machine spoils its round only.
REQUESTS = {1: 24, 64: 2, 512: 1, 4096: 1}
_SAYS = """\
Each cell is the time of a block over the time of the block beside it with all counting off, less
one: the median of all rounds, and where it lies with 95 % certainty. `counted` is mode frozen as it
always runs: routers count assignments, servers executions, both report, the controller stores.
`sampled` is mode adaptive with a ceiling: scores sampled, reported and judged, windows closed and
pushed. Its rate is so small that no pick changes, and outputs are compared with transformers'
block. The whole cluster is in one process, so that everything it does to count competes with the
layer for the same interpreter: apart, as it is served, router and controller have interpreters of
their own."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(REQUESTS))
    parser.add_argument("--rounds", type=int, default=60, help="4096 rows: a third as many")
    output_options(parser)
    parser.add_argument("--quick", action="store_true", help="a tiny layer: does it run at all?")
    return parser.parse_args()


def _count_nothing(*_: object, **__: object) -> None:
    """In place of what counts."""


_STATE_COUNT = shard._LayerState.count


def _switch(cluster: LocalMesh, *, counting: bool) -> None:
    """Counts or not from now on. What does not change is not reported, either."""
    counts = cluster.routers[0].router.counts
    add = type(counts).add.__get__(counts) if counting else _count_nothing
    counts.add = add  # type: ignore[method-assign]
    shard._LayerState.count = _STATE_COUNT if counting else _count_nothing  # type: ignore[method-assign]


def _percent(over: list[float], under: list[float]) -> str:
    found = Interval.of([a / b for a, b in zip(over, under, strict=True)])
    low, middle, high = (
        f"{100 * (each - 1):+.1f}" for each in (found.low, found.median, found.high)
    )
    return f"{middle} % ({low} to {high})"


def _measure(
    report: Report,
    meshes: dict[str, LocalMesh],
    block: torch.nn.Module,
    rows: torch.Tensor,
    rounds: int,
) -> None:
    tokens = len(rows)
    rounds = rounds if tokens < 4096 else max(6, rounds // 3)
    case, expected = f"T = {tokens}", block(rows[None])[0]
    clients = {name: expertmesh.connect(mesh.address) for name, mesh in meshes.items()}

    def side(name: str, *, counting: bool) -> Callable[[int], object]:
        mesh, client = meshes[name], clients[name]

        def run(_: int) -> None:
            _switch(mesh, counting=counting)
            for _ in range(REQUESTS.get(tokens, 1)):
                client.forward(rows, 0)

        return run

    for client in clients.values():
        report.gate(case, client.forward(rows, 0), expected, TOLERANCE)
    seconds = interleave(
        {
            "off": side("frozen", counting=False),
            "counted": side("frozen", counting=True),
            "sampled": side("adaptive", counting=True),
        },
        rounds,
    )
    report.add(
        case,
        counted=_percent(seconds["counted"], seconds["off"]),
        sampled=_percent(seconds["sampled"], seconds["off"]),
        **{"off ms": round(1e3 * Spread.of(seconds["off"]).median / REQUESTS.get(tokens, 1), 3)},
        rounds=rounds,
    )
    for client in clients.values():
        client.close()


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it twice, measures, and removes it."""
    arguments = _arguments()
    shape = QUICK if arguments.quick else LITE
    report = Report(
        theme="counts-quick" if arguments.quick else "counts",
        title="What counting and sampling cost a DeepSeek-V2-Lite layer on the CPU",
        command=f"python benchmarks/bench_counts.py --rounds {arguments.rounds}"
        f"{' --quick' * arguments.quick}",
        says=f"{shape}, bf16.\n{_SAYS}",
        facts=facts(),
    )
    block = make_block(shape)
    adaptive = BalanceConfig(mode="adaptive", update_rate=1e-12, divergence_ceiling=0.05)
    with tempfile.TemporaryDirectory() as folder:
        save_block(block, Path(folder))
        with (
            local_mesh(folder) as frozen,
            local_mesh(folder, balance=adaptive) as moving,
        ):
            for tokens in arguments.tokens:
                rows = make_rows(shape, tokens, 0)
                meshes = {"frozen": frozen, "adaptive": moving}
                _measure(report, meshes, block, rows, arguments.rounds)
            _switch(frozen, counting=True)
    report.publish(arguments)


if __name__ == "__main__":
    main()
