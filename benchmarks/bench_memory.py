"""Memory of router and expert servers: over many requests, and with large ones in flight.

python benchmarks/bench_memory.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: see bench_path

import torch
import uvloop
from harness import Report, output_options
from layer import TINY_EXPERTS, make_block, make_rows, save_block
from load import anonymous_bytes, run_block
from machine import facts
from services import cluster

from expertmesh.client import AsyncMesh, connect_async

_CLIENTS = 32
_LARGE_TOKENS = 4096  # 16 MiB each way
_LARGE_AT_ONCE = 4
_SAMPLE_S = 0.01
_MIB = 1 << 20
_TOLERANCE = 1e-2  # bf16
_SAYS = f"""\
Processes on one machine, without Ray; two expert servers that compute nothing (`--backend
noop`). RssAnon in MiB: pages of a process's own. `idle` is after {_CLIENTS} clients' first tenth
of small requests (T = 1, router gates), `after` when all are answered, with nothing in flight.
`peak` is the largest seen, every {1e3 * _SAMPLE_S:.0f} ms, while {_LARGE_AT_ONCE} requests of T
= {_LARGE_TOKENS} (caller gates, {_LARGE_TOKENS * TINY_EXPERTS.hidden * 2 // _MIB} MiB each way)
are in flight at once; `in flight` is their in + out in that process, `factor` is (peak - after)
over it."""


class Watch:
    """Samples processes until told to stop; keeps the largest."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.peaks = dict.fromkeys(pids, 0)

    async def run(self) -> None:
        """Samples until cancelled."""
        while True:
            for name, pid in self._pids.items():
                self.peaks[name] = max(self.peaks[name], anonymous_bytes(pid))
            await asyncio.sleep(_SAMPLE_S)


def _read(pids: dict[str, int]) -> dict[str, int]:
    return {name: anonymous_bytes(pid) for name, pid in pids.items()}


async def _measure(report: Report, address: str, requests: int, rounds: int) -> None:
    block = make_block(TINY_EXPERTS)
    async with await connect_async(address) as mesh:
        status = await mesh.status()
        pids = {"router": status.pid}
        pids |= {f"server {i}": server.pid for i, server in enumerate(status.servers)}
        small, large = make_rows(TINY_EXPERTS, 1, 1), make_rows(TINY_EXPERTS, _LARGE_TOKENS, 2)
        _, weights, ids = block.gate(large)
        ask_small = _gated(report, pids, mesh, small, block.gate(small)[1], {})
        routing = {"expert_ids": ids, "expert_weights": weights}
        ask_large = _gated(report, pids, mesh, large, weights, routing)
        await run_block([ask_small] * _CLIENTS, requests // 10 // _CLIENTS)
        idle = _read(pids)
        await run_block([ask_small] * _CLIENTS, requests // _CLIENTS)
        after = _read(pids)
        watch = Watch(pids)
        watching = asyncio.ensure_future(watch.run())
        await run_block([ask_large] * _LARGE_AT_ONCE, rounds)
        watching.cancel()
    in_and_out = 2 * large.nbytes * _LARGE_AT_ONCE
    for name in pids:
        # The router holds a request and its answer; each server its part of both.
        report.add(
            name,
            requests=requests,
            **{"idle": idle[name] // _MIB, "after": after[name] // _MIB},
            **{"peak": watch.peaks[name] // _MIB, "in flight": in_and_out // _MIB},
            factor=round((watch.peaks[name] - after[name]) / in_and_out, 2),
        )


def _gated(
    report: Report,
    pids: dict[str, int],
    mesh: AsyncMesh,
    rows: torch.Tensor,
    weights: torch.Tensor,
    routing: dict[str, torch.Tensor],
) -> Callable[[], object]:
    """A request whose first answer, and every hundredth, passes the gate."""
    expected = (rows.float() * weights.float().sum(1, keepdim=True)).to(rows.dtype)
    asked = 0

    async def ask() -> None:
        nonlocal asked
        output = await mesh.forward(rows, 0, timeout=120.0, **routing)
        if asked % 100 == 0:
            for name in pids:
                report.gate(name, output, expected, _TOLERANCE)
        asked += 1

    return ask


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it, measures, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15, help="large requests of each client")
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        theme="memory",
        title="Memory of router and expert servers",
        command=f"python benchmarks/bench_memory.py --requests {arguments.requests}",
        says=f"{TINY_EXPERTS}, bf16.\n{_SAYS}",
        facts=facts(),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_block(make_block(TINY_EXPERTS), folder)
        with cluster(folder, folder, 2, backend="noop") as address:
            uvloop.run(_measure(report, address, arguments.requests, arguments.rounds))
    report.publish(arguments)


if __name__ == "__main__":
    main()
