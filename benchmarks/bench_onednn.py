"""The onednn backend alone against transformers' experts, and against what the machine can do.

python benchmarks/bench_onednn.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# As in a server: threads that wait sleep. Else those of one side go on spinning for some
# milliseconds, on the cores that the next side is measured on.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from ceilings import GEMM_FLOP, READ_BYTES, gemm, read
from harness import Report, Spread, interleave, output_options, ratios
from layer import LITE, QUICK, Shape, make_block, make_rows
from machine import facts

from expert_service.backend import Backend
from expert_service.kernels import create_backend
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot

TOLERANCE = 1e-2  # bf16
INT8_TOLERANCE = 4e-2  # 8 bits in weights, x and, with its far outliers, the intermediate
_PEERS = ("eager", "grouped_mm", "batched_mm")
_BATCHED_BYTES = 2 << 30  # batched_mm copies every pair's weights: left out where they are more
_INPUTS = 4  # taken in turn, so that a small batch does not find its experts in a cache
_SAYS = """\
Routed experts only: gate and shared experts are left out on both sides, which get the same hidden
states, expert ids and weights. `ratio` is the time of the best of transformers' implementations
over the time of the onednn backend, round by round: median (least–largest); above 1 the backend is
faster. `of read` is the weights of the experts that were hit, once, by the backend's time, over the
bandwidth of reading 512 MiB with all threads; `of GEMM` is its arithmetic by its time, over one
bf16 product of 2048 x 2048 x 2048. Both ceilings are measured in every round beside the sides, and
the shares taken round by round. `int8 speed` is the time of bf16 over the time of int8 weights;
`int8 error` is int8's relative error, `error` that of the others, both against eager in bf16.
One layer with random weights and even routing, in one process, with all cores as its threads."""

Side = Callable[[int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """What all sides are given."""

    hidden: torch.Tensor  # [T, H]
    ids: torch.Tensor  # int32 [T, K]
    weights: torch.Tensor  # float32 [T, K]

    @property
    def hit(self) -> int:
        """Experts with at least one row."""
        return len(self.ids.unique())


def make_batch(shape: Shape, tokens: int, seed: int) -> Batch:
    """So many rows and an even routing of them; another for each seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices
    weights = torch.rand(tokens, shape.top_k, generator=generator).softmax(dim=-1)
    return Batch(make_rows(shape, tokens, seed), ids.to(torch.int32), weights)


def make_backend(dtype: str, shape: Shape, experts: torch.nn.Module) -> Backend:
    """The onednn backend with those experts, in "bf16" or "int8"."""
    layer = LayerSpec(
        index=0,
        num_experts=shape.experts,
        intermediate_size=shape.intermediate,
        shared_intermediate_size=0,
        gate=GateSpec(score="softmax", top_k=shape.top_k),
    )
    spec = ModelSpec(
        model_type="bench", hidden_size=shape.hidden, dtype=torch.bfloat16, layers=(layer,)
    )
    threads = torch.get_num_threads()
    weights = "int8" if dtype == "int8" else "auto"
    backend = create_backend("onednn", "cpu", torch.bfloat16, spec, threads, weights=weights)
    for expert in range(shape.experts):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        backend.load(Slot(0, expert), ExpertWeights(gate, up, experts.down_proj[expert]))
    backend.finish_loading()
    return backend


def our_side(backend: Backend, batches: list[Batch]) -> Side:
    """The backend, on the batches in turn."""

    def run(index: int) -> torch.Tensor:
        batch = batches[index % len(batches)]
        return backend.compute(0, batch.hidden, batch.ids, batch.weights)

    return run


def peer_side(name: str, experts: torch.nn.Module, batches: list[Batch]) -> Side:
    """One of transformers' implementations, on the batches in turn."""
    ids = [batch.ids.long() for batch in batches]

    def run(index: int) -> torch.Tensor:
        batch = batches[index % len(batches)]
        experts.config._experts_implementation = name
        output: torch.Tensor = experts(batch.hidden, ids[index % len(ids)], batch.weights)
        return output

    return run


def _gate(report: Report, case: str, sides: Mapping[str, Side]) -> None:
    """Every side against transformers' plainest, on every input; warms all of them up."""
    for index in range(_INPUTS):
        expected = sides["eager"](index)
        for name, side in sides.items():
            if name == "int8":
                report.gate(f"{case} int8", side(index), expected, INT8_TOLERANCE)
            else:
                report.gate(case, side(index), expected, TOLERANCE)


def _measure(
    report: Report,
    backends: Mapping[str, Backend],
    experts: torch.nn.Module,
    shape: Shape,
    tokens: int,
    repeats: int,
) -> None:
    case = f"T = {tokens}"
    batches = [make_batch(shape, tokens, seed) for seed in range(_INPUTS)]
    pairs = tokens * shape.top_k
    peers = {
        name: peer_side(name, experts, batches)
        for name in _PEERS
        if name != "batched_mm" or pairs * shape.expert_bytes <= _BATCHED_BYTES
    }
    ours = {name: our_side(backend, batches) for name, backend in backends.items()}
    _gate(report, case, {**ours, **peers})
    rounds = repeats if tokens <= 64 else max(5, repeats // 4)
    seconds = interleave({**ours, "read": read, "GEMM": gemm, **peers}, rounds)
    medians_ms = {name: 1e3 * Spread.of(times).median for name, times in seconds.items()}
    best = min(peers, key=lambda name: medians_ms[name])
    hit = [batches[index % _INPUTS].hit for index in range(rounds)]
    report.add(
        case,
        ratio=ratios(seconds[best], seconds["bf16"]),
        best=best,
        **{
            "of read": _share(seconds, "read", READ_BYTES, [n * shape.expert_bytes for n in hit]),
            "of GEMM": _share(
                seconds, "GEMM", GEMM_FLOP, [pairs * shape.expert_bytes] * rounds
            ),  # 2 operations for each element of 2 bytes
        },
        **{
            f"{name} ms": round(medians_ms[name], 2) if name in medians_ms else "–"
            for name in ("bf16", "int8", *_PEERS)
        },
        **{
            "int8 speed": ratios(seconds["bf16"], seconds["int8"]),
            "int8 error": f"{report.errors[f'{case} int8']:.1e}",
            "read GB/s": round(READ_BYTES / medians_ms["read"] / 1e6, 1),
            "GEMM TFLOP/s": round(GEMM_FLOP / medians_ms["GEMM"] / 1e9, 3),
        },
        rounds=rounds,
    )


def _share(
    seconds: Mapping[str, list[float]], ceiling: str, amount: float, ours: list[int]
) -> Spread:
    """What the backend did in a second, as a share of the ceiling of the same round."""
    rounds = zip(ours, seconds["bf16"], seconds[ceiling], strict=True)
    return Spread.of([done / took * at_best / amount for done, took, at_best in rounds])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--repeats", type=int, default=40, help="rounds; a quarter above 64 tokens")
    output_options(parser)
    parser.add_argument("--quick", action="store_true", help="a tiny layer: does it run at all?")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Makes the layer, checks, measures."""
    arguments = _arguments()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = QUICK if arguments.quick else LITE
    tokens = arguments.tokens
    report = Report(
        theme="onednn-quick" if arguments.quick else "onednn",
        title="Routed experts of a DeepSeek-V2-Lite layer on the CPU: onednn against transformers",
        command=f"python benchmarks/bench_onednn.py --tokens {' '.join(map(str, tokens))} "
        f"--repeats {arguments.repeats}{' --quick' * arguments.quick}",
        says=f"{shape}, bf16.\n{_SAYS}",
        facts=facts(),
    )
    experts = make_block(shape).experts
    backends = {name: make_backend(name, shape, experts) for name in ("bf16", "int8")}
    for count in tokens:
        _measure(report, backends, experts, shape, count, arguments.repeats)
    report.publish(arguments)


if __name__ == "__main__":
    main()
