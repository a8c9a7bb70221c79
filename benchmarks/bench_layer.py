"""One MoE layer through the whole cluster against transformers' block in this process.

python benchmarks/bench_layer.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

# Before torch is imported: threads of a side that waits sleep, they take no core from the other.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from harness import Report, Spread, interleave, output_options, ratios
from layer import LITE, QUICK, Shape, make_block, make_rows, save_block
from machine import facts

import expertmesh
from fleet import launch

TOLERANCE = 1e-2  # bf16
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_BATCHED_BYTES = 2 << 30  # batched_mm copies every pair's weights: left out where they are more
_INPUTS = 4  # taken in turn, so that a small batch does not find its experts in a cache
_SHARDS = 2
_TIMEOUT_S = 300.0
_SAYS = """\
`ratio` is the time of the best in-process implementation over the time of the cluster, round by
round: median (least–largest); above 1 the cluster is faster. Both sides do the whole block: gate,
routed experts, shared experts, sum. The cluster is the one that `launch` starts on Ray, on the same
machine: client → gRPC → router → 2 shards → back, with what Ray's own processes take. The
in-process block has all cores as threads, the shards have the same cores divided between them. One
layer with random weights, hence even routing: this says nothing of skewed loads, of several layers
in one model, or of a network between machines."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--repeats", type=int, default=40, help="rounds; a quarter above 64 tokens")
    output_options(parser)
    parser.add_argument("--quick", action="store_true", help="a tiny layer: does it run at all?")
    return parser.parse_args()


def _in_process(
    block: torch.nn.Module, implementation: str, inputs: list[torch.Tensor]
) -> Callable[[int], torch.Tensor]:
    def run(index: int) -> torch.Tensor:
        block.config._experts_implementation = implementation
        output: torch.Tensor = block(inputs[index % len(inputs)][None])[0]
        return output

    return run


def _in_cluster(mesh: expertmesh.Mesh, inputs: list[torch.Tensor]) -> Callable[[int], torch.Tensor]:
    return lambda index: mesh.forward(inputs[index % len(inputs)], 0, timeout=_TIMEOUT_S)


def _gate(report: Report, case: str, sides: Mapping[str, Callable[[int], torch.Tensor]]) -> None:
    """Every side against transformers' plainest, on every input; warms all of them up."""
    for index in range(_INPUTS):
        expected = sides["eager"](index)
        for side in sides.values():
            report.gate(case, side(index), expected, TOLERANCE)


def _measure(
    report: Report,
    mesh: expertmesh.Mesh,
    block: torch.nn.Module,
    shape: Shape,
    tokens: int,
    repeats: int,
) -> None:
    case = f"T = {tokens}"
    inputs = [make_rows(shape, tokens, seed) for seed in range(_INPUTS)]
    feasible = {
        name: _in_process(block, name, inputs)
        for name in _IMPLEMENTATIONS
        if name != "batched_mm" or tokens * shape.top_k * shape.expert_bytes <= _BATCHED_BYTES
    }
    sides = {"cluster": _in_cluster(mesh, inputs), **feasible}
    _gate(report, case, sides)
    rounds = repeats if tokens <= 64 else max(5, repeats // 4)
    seconds = interleave(sides, rounds)
    medians_ms = {name: 1e3 * Spread.of(times).median for name, times in seconds.items()}
    best = min(feasible, key=lambda name: medians_ms[name])
    report.add(
        case,
        ratio=ratios(seconds[best], seconds["cluster"]),
        best=best,
        **{
            f"{name} ms": round(medians_ms[name], 3) if name in medians_ms else "–"
            for name in ("cluster", *_IMPLEMENTATIONS)
        },
        rounds=rounds,
    )


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it, measures, and removes it."""
    arguments = _arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = QUICK if arguments.quick else LITE
    tokens = arguments.tokens
    report = Report(
        theme="layer-quick" if arguments.quick else "layer",
        title="One DeepSeek-V2-Lite layer on the CPU: the cluster against transformers in process",
        command=f"python benchmarks/bench_layer.py --tokens {' '.join(map(str, tokens))} "
        f"--repeats {arguments.repeats}{' --quick' * arguments.quick}",
        says=f"{shape}, bf16.\n{_SAYS}",
        facts=facts(),
    )
    block = make_block(shape)
    with tempfile.TemporaryDirectory() as folder:
        save_block(block, Path(folder))
        with (
            launch(folder, shards=_SHARDS) as cluster,
            expertmesh.connect(cluster.address) as mesh,
        ):
            for count in tokens:
                _measure(report, mesh, block, shape, count, arguments.repeats)
    report.publish(arguments)


if __name__ == "__main__":
    main()
