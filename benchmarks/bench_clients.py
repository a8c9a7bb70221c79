"""Many clients at once: how throughput grows with decoding clients, and with routers.

python benchmarks/bench_clients.py decode [--hardware 2core-epyc]     # 64 against one, real experts
python benchmarks/bench_clients.py routers [--hardware 2core-epyc]    # 1, 2 and 4 routers
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported: see bench_path

import torch
import uvloop
from harness import Report, Spread, output_options, quantile, ratios
from layer import LITE, QUICK, TINY_EXPERTS, Shape, make_block, make_rows, save_block
from load import Block, Request, cpu_seconds, run_block
from machine import facts
from services import cluster

from expertmesh.client import AsyncMesh, connect_async

_CLIENTS = 64
_ROUTERS = (1, 2, 4)
_SHARDS = 2
_TIMEOUT_S = 120.0
_TOLERANCE = 2e-2  # bf16
_DECODE_SAYS = f"""\
Processes on one machine, without Ray: clients (one process, a connection each), a router,
{_SHARDS} expert servers (onednn, one thread each). Every client decodes: T = 1, {_CLIENTS} rows in
turn, its next request when the last is answered. `tokens/s` is of all clients together; `ratio` is
{_CLIENTS} clients over one, round by round."""
_ROUTERS_SAYS = f"""\
Processes on one machine, without Ray: one client connection that knows every router and picks
the one with the fewest requests in flight, {_CLIENTS} requests of T = 1 under way all the time,
{_SHARDS} expert servers that compute nothing. CPU seconds are those of one second of the run, by
process: they say what limits it. 2 cores have 2.00 to give, whatever the number of routers."""


async def _decode(report: Report, address: str, shape: Shape, rounds: int, requests: int) -> None:
    block = make_block(shape)
    rows = make_rows(shape, _CLIENTS, seed=3)
    expected = block(rows[None])[0]
    results: dict[int, list[Block]] = {1: [], _CLIENTS: []}
    async with AsyncExitStack() as stack:
        calls: list[Request] = []
        for index in range(_CLIENTS):
            mesh = await stack.enter_async_context(await connect_async(address))
            output = await mesh.forward(rows[index : index + 1], 0, timeout=_TIMEOUT_S)
            for clients in results:
                report.gate(_plural(clients), output, expected[index : index + 1], _TOLERANCE)
            calls.append(_asking(mesh, [*rows.roll(-index, 0).split(1)]))
        for index in range(-1, rounds):  # the first one warms up
            for clients, blocks in results.items():
                ran = await run_block(calls[:clients], requests * (4 if clients == 1 else 1))
                if index >= 0:
                    blocks.append(ran)
    one = [block.requests_per_s for block in results[1]]
    for clients, blocks in results.items():
        speeds = [block.requests_per_s for block in blocks]
        latencies = [each for block in blocks for each in block.latencies_ms]
        report.add(
            _plural(clients),
            **{"tokens/s": Spread.of(speeds), "p50 ms": round(quantile(latencies, 0.5), 2)},
            **{"p99 ms": round(quantile(latencies, 0.99), 2)},
            ratio=ratios(speeds, one),
            samples=len(latencies),
        )


def _plural(clients: int) -> str:
    return f"{clients} client{'s' * (clients > 1)}"


def _asking(mesh: AsyncMesh, rows: list[torch.Tensor]) -> Request:
    """Asks for them in turn: as with a model's tokens, each has experts of its own."""
    turn = itertools.cycle(rows)
    return lambda: mesh.forward(next(turn), 0, timeout=_TIMEOUT_S)


async def _routers(report: Report, addresses: str, count: int, rounds: int, requests: int) -> None:
    shape, case = TINY_EXPERTS, f"{count} router{'s' * (count > 1)}"
    rows = make_rows(shape, 1, seed=3)
    _, weights, _ = make_block(shape).gate(rows)
    expected = (rows.float() * weights.float().sum(1, keepdim=True)).to(rows.dtype)
    async with await connect_async(addresses) as mesh:
        for _ in range(2 * count):
            output = await mesh.forward(rows, 0, timeout=_TIMEOUT_S)
            report.gate(case, output, expected, _TOLERANCE)
        calls = [_asking(mesh, [rows])] * _CLIENTS
        await run_block(calls, requests)
        statuses = await mesh.statuses()
        pids = {f"router {index}": status.pid for index, status in enumerate(statuses)}
        pids |= {f"server {i}": server.pid for i, server in enumerate(statuses[0].servers)}
        pids["clients"] = os.getpid()
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        start = time.perf_counter()
        blocks = [await run_block(calls, requests) for _ in range(rounds)]
        took_s = time.perf_counter() - start
        used = {name: (cpu_seconds(pid) - before[name]) / took_s for name, pid in pids.items()}
    latencies = [each for block in blocks for each in block.latencies_ms]
    report.add(
        case,
        **{"requests/s": Spread.of([block.requests_per_s for block in blocks])},
        **{"p50 ms": round(quantile(latencies, 0.5), 2)},
        **{"p99 ms": round(quantile(latencies, 0.99), 2)},
        **{f"CPU s, {kind}": _listed(used, kind) for kind in ("clients", "router", "server")},
        **{"CPU s, all": f"{sum(used.values()):.2f}"},
        samples=len(latencies),
    )


def _listed(used: dict[str, float], kind: str) -> str:
    return ", ".join(f"{value:.2f}" for name, value in used.items() if name.startswith(kind))


def _run_decode(folder: Path, arguments: argparse.Namespace) -> Report:
    shape = QUICK if arguments.quick else LITE
    report = Report(
        theme="decode",
        title=f"{_CLIENTS} decoding clients against one, a DeepSeek-V2-Lite layer",
        command=f"python benchmarks/bench_clients.py decode --rounds {arguments.rounds}",
        says=f"{shape}, bf16.\n{_DECODE_SAYS}",
        facts=facts(),
    )
    save_block(make_block(shape), folder)
    with cluster(folder, folder, _SHARDS) as address:
        uvloop.run(_decode(report, address, shape, arguments.rounds, arguments.requests))
    return report


def _run_routers(folder: Path, arguments: argparse.Namespace) -> Report:
    report = Report(
        theme="routers",
        title="Several routers behind one client",
        command=f"python benchmarks/bench_clients.py routers --rounds {arguments.rounds}",
        says=f"{TINY_EXPERTS}, bf16.\n{_ROUTERS_SAYS}",
        facts=facts(),
    )
    save_block(make_block(TINY_EXPERTS), folder)
    for count in _ROUTERS:
        with ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            addresses = stack.enter_context(cluster(folder, place, _SHARDS, "noop", routers=count))
            run = _routers(report, addresses, count, arguments.rounds, arguments.requests)
            uvloop.run(run)
    return report


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it, measures, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("decode", "routers"), nargs="?", default="routers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=30, help="of each client in a round")
    parser.add_argument("--quick", action="store_true", help="a tiny layer: whether it works")
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        run = {"decode": _run_decode, "routers": _run_routers}[arguments.what]
        report = run(Path(name), arguments)
    report.publish(arguments)


if __name__ == "__main__":
    main()
