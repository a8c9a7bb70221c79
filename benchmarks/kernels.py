"""Expert kernels against the floor and against others' on a GPU.

python benchmarks/kernels.py [--hardware h200] [--json times.json]
python benchmarks/kernels.py --rehearse     # on a CPU: does it all run, and are outputs right?
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel's module is imported

import torch
from compiling import Compilers, idle_cores, target_here, wait_for
from gpu_timing import Calls, Sides, bf16_flops_per_s, copy_bytes_per_s, fastest
from harness import Report, WrongOutputError, relative_error
from kernel_cases import (
    H200,
    SHARDS,
    TINY_SHARDS,
    TINY_TOKENS,
    TOKENS,
    Chip,
    Shard,
    Weights,
    floor_us,
)
from kernel_cases import required_us as must_reach_us
from kernel_foreign import installed
from kernel_inputs import Inputs, make_inputs, make_matrices, reference, to_fp8
from kernel_peers import Side, compiled, fits, in_bfloat16, peers
from machine import facts, version

from expert_service.kernels.triton.backend.tiles import TileChoice
from expert_service.kernels.triton.experts import grouped_swiglu_experts
from expert_service.kernels.triton.matrices import ExpertMatrices
from expert_service.kernels.triton.tables.tables import read_tables

#: Of outputs, relative to their norm. w8a8 rounds activations to 4 bits.
TOLERANCE: dict[Weights, float] = {"bf16": 1e-2, "w8a16": 1e-2, "w8a8": 6e-2}
_FEW_TOKENS = 128  # above, a batch hits every expert: more weights than a cache holds
_OURS = "ours"
_SAYS = """\
Microseconds of one call, medians. `floor`: the bytes of the weights of hit experts and of the rows,
or the operations, whichever takes longer: on an H200 at 4.3 TB/s and 780 TFLOP/s, elsewhere at what
was measured in this run (w8a8 at 1.92 times as many operations). `must`: what the project asks for
of an H200. `graph` and `eager` are ours, replayed from a CUDA graph and launched from
Python; peers show the faster of the two. Each call takes another of several batches, with a routing
of its own, so that weights come from memory. Random weights and even routing: this says nothing of
skewed loads. All outputs were compared with a float32 reference before anything was timed."""


@dataclass
class Bench:
    """What one run has found so far."""

    arguments: argparse.Namespace
    report: Report
    device: str
    chip: Chip = H200
    started: float = field(default_factory=time.monotonic)
    failures: list[str] = field(default_factory=list)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)
    times_us: dict[str, dict[str, float]] = field(default_factory=dict)
    bf16_us: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def rehearsing(self) -> bool:
        """Whether nothing is timed."""
        return bool(self.arguments.rehearse)

    def has_time(self) -> bool:
        """Whether there is time left to compile peers."""
        return time.monotonic() - self.started < self.arguments.budget_s


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="default 1 16 128 1024 8192")
    parser.add_argument("--shards", nargs="+", help="parts of names; default all four")
    parser.add_argument("--weights", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sets", type=int, default=8, help="batches taken in turn")
    parser.add_argument("--budget-s", type=float, default=200, help="then no peer is compiled")
    parser.add_argument("--tables", type=Path, help="folder of tiles that come before the shipped")
    parser.add_argument("--no-peers", action="store_true", help="only ours")
    parser.add_argument("--hardware", help="writes benchmarks/results, e.g. h200")
    parser.add_argument("--json", type=Path, help="writes every time of every side there")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, nothing timed")
    return parser.parse_args()


def _ours(matrices: ExpertMatrices, weights: Weights, choice: TileChoice) -> Side:
    w8a8 = weights == "w8a8"

    def run(hidden: torch.Tensor, ids: torch.Tensor, gate_weights: torch.Tensor) -> torch.Tensor:
        tiles = choice.tiles(ids.numel(), matrices.sizes, matrices.precision(w8a8))
        return grouped_swiglu_experts(hidden, ids, gate_weights, matrices, tiles=tiles, w8a8=w8a8)

    return run


def _others(bench: Bench, matrices: ExpertMatrices) -> dict[str, Side]:
    """The sides beside ours, for 16-bit weights. Compiled ones come last."""
    if bench.arguments.no_peers:
        return {}
    gate_up = torch.cat((matrices.gate_LIH, matrices.up_LIH), dim=1).bfloat16()
    down = matrices.down_LHI.bfloat16()
    found = peers(gate_up, down)
    backend = "eager" if bench.rehearsing else "inductor"
    compiling = {f"{name} compiled": compiled(side, backend) for name, side in found.items()}
    for name, make in installed().items():
        try:
            found[name] = make(gate_up, down)
        except Exception as error:  # whatever another engine raises where it cannot run
            _note(bench, "foreign", name, f"{type(error).__name__}: {error}")
    sides = {**found, **compiling}
    if bench.rehearsing:  # the interpreter has no bf16, and they take nothing else
        return {name: in_bfloat16(side) for name, side in sides.items()}
    return sides


def _note(bench: Bench, case: str, side: str, text: str) -> None:
    bench.notes.setdefault(case, {})[side] = text
    print(f"{case}: {side}: {text}", file=sys.stderr, flush=True)


def _calls(side: Side, batches: list[Inputs]) -> Calls:
    return [lambda batch=batch: side(*batch) for batch in batches]


def _right_sides(
    bench: Bench,
    case: str,
    sides: dict[str, Side],
    shard: Shard,
    batches: list[Inputs],
    expected: torch.Tensor,
) -> dict[str, Side]:  # fmt: skip
    """The peers that can be run and are right; why others are left out is noted."""
    right = {}
    pairs = batches[0].ids.numel()
    for name, side in sides.items():
        if not fits(name, pairs, 2 * shard.expert_elements):
            _note(bench, case, name, "left out: its copies of weights do not fit")
        elif "compiled" in name and not bench.has_time():
            _note(bench, case, name, "left out: no time left to compile it")
        else:
            try:
                error, _ = relative_error(side(*batches[0]), expected)
                if not error <= TOLERANCE["bf16"]:
                    raise WrongOutputError(f"relative error {error:.2e}")
                right[name] = side
            except Exception as error:  # whatever a peer raises where it cannot run
                _note(bench, case, name, f"{type(error).__name__}: {error}"[:300])
    return right


def _time(bench: Bench, case: str, sides: dict[str, Calls]) -> dict[str, float]:
    timing = Sides(bench.arguments.rounds)
    for name, calls in sides.items():
        timing.add_eager(f"{name} eager", calls)
        timing.add_graph(f"{name} graph", calls)
    times = timing.medians_us()
    for name, text in timing.notes.items():
        _note(bench, case, name, text)
    bench.times_us[case] = times
    return times


def _case(bench: Bench, shard: Shard, weights: Weights, tokens: int) -> str:
    name = "fp16" if weights == "bf16" and bench.rehearsing else weights
    return f"{shard.name} {name} T={tokens}"


def _measure(
    bench: Bench, shard: Shard, weights: Weights, tokens: int, ours: Side,
    matrices: ExpertMatrices, others: dict[str, Side],
) -> None:  # fmt: skip
    """One row: gate, time, compare."""
    dtype = torch.float16 if bench.rehearsing else torch.bfloat16  # the interpreter has no bf16
    case = _case(bench, shard, weights, tokens)
    sets = bench.arguments.sets if tokens <= _FEW_TOKENS else min(2, bench.arguments.sets)
    batches = make_inputs(shard, tokens, sets, dtype, bench.device)
    expected = reference(batches[0], matrices)
    actual = ours(*batches[0])
    bench.report.gate(case, actual, expected, TOLERANCE[weights])
    if not torch.equal(ours(*batches[0]), actual):
        raise WrongOutputError(f"{case}: two runs gave different bits")
    right = _right_sides(bench, case, others, shard, batches, expected)
    if bench.rehearsing:
        bench.report.add(case, sides=", ".join([_OURS, *right]))
        return

    sides = {name: _calls(side, batches) for name, side in {_OURS: ours, **right}.items()}
    times = _time(bench, case, sides)
    best_us = fastest(times, _OURS)
    if weights == "bf16":
        bench.bf16_us[shard.name, tokens] = best_us
    hit = sum(len(batch.ids.unique()) for batch in batches) / len(batches)
    floor = floor_us(shard, tokens, round(hit), weights, bench.chip)
    bf16_us = bench.bf16_us.get((shard.name, tokens))
    must = must_reach_us(shard, tokens, weights, floor, bf16_us, bench.chip)
    peers_us = {name: fastest(times, name) for name in right}
    rate = f"{shard.flops(tokens) / best_us / 1e6:.0f}"
    _add_times(bench, case, times, floor, must, {"TFLOP/s": rate}, peers_us)


def _add_times(
    bench: Bench, case: str, times: dict[str, float], floor: tuple[float, str], must: float | None,
    more: dict[str, object], peers_us: dict[str, float],
) -> None:  # fmt: skip
    """A row of the table; `times` has "ours eager", and "ours graph" if that was captured."""
    eager_us, graph_us = times[f"{_OURS} eager"], times.get(f"{_OURS} graph")
    best_us = fastest(times, _OURS)
    grouped = [us for name, us in peers_us.items() if "grouped_mm" in name]
    peer = min(peers_us, key=lambda name: peers_us[name], default=None)
    bench.report.add(
        case,
        **{
            "floor": f"{floor[0]:.1f} {floor[1]}",
            "must": "–" if must is None else f"{must:.0f}",
            "graph": "–" if graph_us is None else f"{graph_us:.1f}",
            "eager": f"{eager_us:.1f}",
            "x floor": f"{best_us / floor[0]:.2f}",
            "holds": "–" if must is None else "yes" if best_us <= must else "no",
            **more,
            "best peer": "–" if peer is None else f"{peer} {peers_us[peer]:.1f}",
            "x peer": "–" if peer is None else f"{peers_us[peer] / best_us:.2f}",
            "x grouped_mm": f"{min(grouped) / best_us:.2f}" if grouped else "–",
        },
    )


def _measure_chip(bench: Bench) -> None:
    """What this GPU reaches; an H200's floors are those that the requirements were made from."""
    measured = Chip(copy_bytes_per_s(), bf16_flops_per_s())
    bench.chip = H200 if "H200" in torch.cuda.get_device_name() else measured
    rates = (measured.bytes_per_s, measured.flops_per_s)
    said = "copies {:.2f} TB/s, bf16 products {:.0f} TFLOP/s".format(*(r / 1e12 for r in rates))
    bench.report.facts = {**bench.report.facts, "measured": said}


def _compile(
    shards: Sequence[Shard], weights: Sequence[Weights], tokens: Sequence[int], choice: TileChoice
) -> None:
    """What will be timed, on all cores: one after the other, it would take longer than timing."""
    with Compilers(idle_cores(), target_here()) as compilers:
        futures = []
        for shard, precision, count in product(shards, weights, tokens):
            sizes = (shard.experts, shard.hidden, shard.intermediate)
            tiles = choice.tiles(count * shard.top_k, sizes, precision)
            futures.append(compilers.experts(sizes, shard.top_k, precision, count, tiles))
        wait_for(futures)


def _run(bench: Bench) -> None:
    arguments = bench.arguments
    chip = "" if bench.rehearsing else torch.cuda.get_device_name()
    tuned = read_tables(arguments.tables) if arguments.tables else ()
    choice = TileChoice(chip, (*tuned, *read_tables()))
    shards = TINY_SHARDS if bench.rehearsing else SHARDS
    tokens = arguments.tokens or (TINY_TOKENS if bench.rehearsing else TOKENS)
    wanted = arguments.shards or [""]
    shards = tuple(s for s in shards if any(w.lower() in s.name.lower() for w in wanted))
    if not bench.rehearsing:
        _compile(shards, arguments.weights, tokens, choice)
    for shard in shards:
        dtype = torch.float16 if bench.rehearsing else torch.bfloat16
        plain = make_matrices(shard, dtype, bench.device)
        for weights in arguments.weights:
            matrices = plain if weights == "bf16" else to_fp8(plain)
            others = _others(bench, plain) if weights == "bf16" else {}
            for count in tokens:
                try:
                    ours = _ours(matrices, weights, choice)
                    _measure(bench, shard, weights, count, ours, matrices, others)
                except (WrongOutputError, ValueError, RuntimeError) as error:
                    _fail(bench, _case(bench, shard, weights, count), error)


def _fail(bench: Bench, case: str, error: Exception) -> None:
    bench.failures.append(f"{case}: {type(error).__name__}: {error}")
    print(bench.failures[-1], file=sys.stderr, flush=True)


@torch.inference_mode()
def main() -> int:
    """Measures and prints. The exit code says whether every output of ours was right."""
    arguments = _arguments()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("no CUDA device: use --rehearse to check without times", file=sys.stderr)
        return 2
    if arguments.rehearse:
        arguments.sets = 1
    device = "cpu" if arguments.rehearse else "cuda"
    gpu = "none: rehearsed" if arguments.rehearse else torch.cuda.get_device_name()
    report = Report(
        theme="kernels",
        title="Expert kernels on a GPU, beside the floor and beside others'",
        command=f"python benchmarks/kernels.py{' --rehearse' * arguments.rehearse}",
        says="Nothing was timed." if arguments.rehearse else _SAYS,
        facts={"gpu": gpu, "cuda": torch.version.cuda, "triton": version("triton"), **facts()},
    )
    bench = Bench(arguments, report, device)
    if not arguments.rehearse:
        _measure_chip(bench)
    try:
        _run(bench)
    except KeyboardInterrupt:  # out of time: what was measured is shown
        _fail(bench, "the rest", TimeoutError("interrupted"))
    if report.rows:
        print(report.markdown())
    if arguments.json:
        whole = {"rows": report.rows, "times_us": bench.times_us, "notes": bench.notes}
        whole |= {"failures": bench.failures, "facts": dict(report.facts)}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    if arguments.hardware and not arguments.rehearse and not bench.failures:
        report.write(arguments.hardware)
    return 1 if bench.failures or not report.rows else 0


if __name__ == "__main__":
    sys.exit(main())
