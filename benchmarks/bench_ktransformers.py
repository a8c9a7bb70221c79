"""The onednn backend beside ktransformers' bf16 kernel, the same routed experts, in one process.

pip download --no-deps kt-kernel, unpack the wheel, and:
python benchmarks/bench_ktransformers.py --peer FOLDER [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# As in a server: threads that wait sleep.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from bench_onednn import TOLERANCE, Batch, Side, make_backend, make_batch, our_side, peer_side
from harness import Report, Spread, output_options, ratios
from layer import LITE, Shape, make_block
from machine import facts

_INPUTS = 4  # taken in turn, so that a small batch does not find its experts in a cache
_MAX_TOKENS = 4096
_REST_S = 0.3  # between the sides: threads of either spin for a while after a call
_SAYS = """\
Routed experts only. `ktransformers` is the class AMXBF16_MOE of kt-kernel's extension module
VARIANT, called from Python with THREADS worker threads; `onednn` is our backend with as many.
Each side is called `calls` times one after the other, then nobody for 0.3 s, then the other side:
called in turn, each found the other's threads spinning on its cores. A block's time is the median
of its calls but the first. `ratio` is ktransformers' time over ours, block by block: median
(least–largest), above 1 ours is faster. Both are gated against transformers' eager."""


def _load(folder: Path, variant: str) -> Any:
    """kt-kernel's extension module; its Python package wants more than is installed here."""
    (path,) = (folder / "kt_kernel").glob(f"_kt_kernel_ext_{variant}.*.so")
    loader = importlib.machinery.ExtensionFileLoader("kt_kernel_ext", str(path))
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class _Peer:
    """ktransformers' experts of one layer."""

    def __init__(self, module: Any, shape: Shape, experts: torch.nn.Module, threads: int) -> None:
        pool = module.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [threads]
        self._cpu = module.CPUInfer(pool)
        self._top_k = shape.top_k
        pairs = [experts.gate_up_proj[e].chunk(2) for e in range(shape.experts)]
        # Read while they are loaded, and kept as long: pointers are all that is passed.
        self._gates = torch.stack([gate for gate, _ in pairs])
        self._ups = torch.stack([up for _, up in pairs])
        self._downs = experts.down_proj.detach().contiguous()
        config = module.moe.MOEConfig(
            shape.experts, shape.top_k, shape.hidden, shape.intermediate, 0
        )
        config.max_len = _MAX_TOKENS
        config.gate_projs = [[matrix.data_ptr() for matrix in self._gates]]
        config.up_projs = [[matrix.data_ptr() for matrix in self._ups]]
        config.down_projs = [[matrix.data_ptr() for matrix in self._downs]]
        config.pool = self._cpu.backend_
        self._moe = module.moe.AMXBF16_MOE(config)
        self._places = torch.arange(shape.experts)
        self._run(self._moe.load_weights_task(self._places.data_ptr()))

    def _run(self, task: object) -> None:
        self._cpu.submit(task)
        self._cpu.sync()

    def side(self, batches: Sequence[Batch]) -> Side:
        """What computes one batch."""
        ids = [batch.ids.long() for batch in batches]
        counts = [torch.tensor([len(batch.hidden)]) for batch in batches]
        outputs = [torch.empty_like(batch.hidden) for batch in batches]

        def run(index: int) -> torch.Tensor:
            at = index % len(batches)
            batch = batches[at]
            pointers = (ids[at], batch.weights, batch.hidden, outputs[at])
            self._run(
                self._moe.forward_task(
                    counts[at].data_ptr(),
                    self._top_k,
                    *(tensor.data_ptr() for tensor in pointers),
                    False,
                )
            )
            return outputs[at]

        return run


def _block_s(side: Callable[[int], object], calls: int) -> float:
    """Seconds of a call, the median of a block's."""
    seconds = []
    for index in range(calls + 1):
        start = time.perf_counter()
        side(index)
        seconds.append(time.perf_counter() - start)
    time.sleep(_REST_S)
    return statistics.median(seconds[1:])


@torch.no_grad()
def main() -> None:
    """Makes the layer, checks both sides, measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="the unpacked wheel of kt-kernel")
    parser.add_argument("--variant", default="avx512_bf16", help="of its extension modules")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of each side; every core if not given")
    output_options(parser)
    arguments = parser.parse_args()
    if arguments.peer is None:  # `make bench` goes on
        print(
            "nothing is measured without a peer: unpack a wheel of kt-kernel, and name it (--peer)"
        )
        return
    threads = arguments.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    (version,) = (path.name for path in arguments.peer.glob("kt_kernel-*.dist-info"))
    says = _SAYS.replace("VARIANT", arguments.variant).replace("THREADS", str(threads))
    report = Report(
        theme="ktransformers",
        title="Routed experts of a DeepSeek-V2-Lite layer on the CPU: onednn and ktransformers",
        command="python benchmarks/bench_ktransformers.py --peer ... "
        f"--variant {arguments.variant} --blocks {arguments.blocks} --threads {threads}",
        says=f"{LITE}, bf16.\n{says}",
        facts=facts() | {"kt-kernel": version.split("-")[1].removesuffix(".dist")},
    )
    experts = make_block(LITE).experts
    backend = make_backend("bf16", LITE, experts)
    peer = _Peer(_load(arguments.peer, arguments.variant), LITE, experts, threads)
    for tokens in arguments.tokens:
        batches = [make_batch(LITE, tokens, seed) for seed in range(_INPUTS)]
        eager = peer_side("eager", experts, batches)
        sides = {"onednn": our_side(backend, batches), "ktransformers": peer.side(batches)}
        for index in range(_INPUTS):
            expected = eager(index)
            for side in sides.values():
                report.gate(f"T = {tokens}", side(index), expected, TOLERANCE)
        time.sleep(_REST_S)
        calls = max(3, min(40, 400 // tokens))
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for block in range(max(5, arguments.blocks if tokens <= 64 else arguments.blocks // 3)):
            order = list(sides) if block % 2 == 0 else list(reversed(sides))
            for name in order:
                seconds[name].append(_block_s(sides[name], calls))
        report.add(
            f"T = {tokens}",
            ratio=ratios(seconds["ktransformers"], seconds["onednn"]),
            **{f"{n} ms": Spread.of([1e3 * s for s in times]) for n, times in seconds.items()},
            calls=calls,
            blocks=len(seconds["onednn"]),
        )
    report.publish(arguments)


if __name__ == "__main__":
    main()
