"""One client's prompts of 16k tokens beside another's single tokens, with and without turns.

python benchmarks/bench_fairness.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: see bench_path

import torch
import uvloop
from harness import Report, Spread, output_options, quantile
from layer import Shape, make_block, make_rows, save_block
from load import run_beside
from machine import facts
from services import cluster

from expertmesh.client import AsyncMesh, connect_async

SHAPE = Shape(hidden=1024, intermediate=256, experts=32, top_k=4, shared=1)
_PROMPT = 16384  # tokens
_TOLERANCE = 2e-2  # bf16
_WITHOUT = ("small_rows=1 << 30", "block_rows=1 << 30")  # one lane, no blocks
_SAYS = f"""\
Two clients of one process, a connection each, ask a cluster of two expert servers (onednn, one
thread each), all of it on two cores. One decodes: T = 1, its next request when the last is
answered. The other sends prompts of {_PROMPT} tokens without a pause. `turns` is the default: at
the router few rows never wait for many, on the device a large request lets others pass after
1024 rows. `no turns` has neither: one lane ({_WITHOUT[0]}) and no blocks ({_WITHOUT[1]}).
Latencies are the decoding client's, median (least–largest) over the rounds, the sides in turn."""


async def _measure(report: Report, addresses: dict[str, str], seconds: float, rounds: int) -> None:
    block = make_block(SHAPE)
    token, prompt = make_rows(SHAPE, 1, seed=1), make_rows(SHAPE, _PROMPT, seed=2)
    p50: dict[str, list[float]] = {}
    p99: dict[str, list[float]] = {}
    count: dict[str, int] = {}
    async with AsyncExitStack() as stack:
        for name, address in addresses.items():
            first = await stack.enter_async_context(await connect_async(address))
            second = await stack.enter_async_context(await connect_async(address))
            for rows in (token, prompt):
                output = await first.forward(rows, 0, timeout=120.0)
                report.gate(name, output, block(rows[None])[0], _TOLERANCE)
            addresses_of = {f"{name}, alone": None, f"{name}, beside prompts": second}
            for case in addresses_of:
                report.errors[case] = report.errors[name]
                p50[case], p99[case], count[case] = [], [], 0
            for _ in range(rounds):
                for case, other in addresses_of.items():
                    latencies = await run_beside(
                        lambda mesh=first: mesh.forward(token, 0, timeout=120.0),
                        None if other is None else _asking(other, prompt),
                        seconds,
                    )
                    p50[case].append(quantile(latencies, 0.5))
                    p99[case].append(quantile(latencies, 0.99))
                    count[case] += len(latencies)
    for case in p50:
        columns = {"p50 ms": Spread.of(p50[case]), "p99 ms": Spread.of(p99[case])}
        report.add(case, **columns, samples=count[case])


def _asking(mesh: AsyncMesh, prompt: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda: mesh.forward(prompt, 0, timeout=120.0)


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it twice, measures, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each case in a round")
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        theme="fairness",
        title="A decoding client beside prompts of 16k tokens",
        command=f"python benchmarks/bench_fairness.py --rounds {arguments.rounds} "
        f"--seconds {arguments.seconds}",
        says=f"{SHAPE}, bf16.\n{_SAYS}",
        facts=facts(),
    )
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        save_block(make_block(SHAPE), folder)
        (folder / "without").mkdir()
        addresses = {
            "turns": stack.enter_context(cluster(folder, folder, 2)),
            "no turns": stack.enter_context(
                cluster(
                    folder,
                    folder / "without",
                    2,
                    router_settings=_WITHOUT[0],
                    expert_settings=_WITHOUT[1],
                )
            ),
        }
        uvloop.run(_measure(report, addresses, arguments.seconds, arguments.rounds))
    report.publish(arguments)


if __name__ == "__main__":
    main()
