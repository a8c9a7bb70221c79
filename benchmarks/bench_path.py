"""What the path itself costs: experts that compute nothing, beside bare gRPC streams.

python benchmarks/bench_path.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: threads that wait sleep, they take no core from the servers.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
import uvloop
from echo import EchoStream
from harness import Report, Spread, WrongOutputError, output_options, quantile, ratios
from layer import TINY_EXPERTS, Shape, make_block, make_rows, save_block
from machine import facts
from services import cluster, echo_over_two_hops

from expertmesh.client import AsyncMesh, connect_async

_TOLERANCE = 1e-2  # bf16
_SHARDS = 2
_TIMEOUT_S = 120.0
_SAYS = f"""\
Every process is on one machine, without Ray: clients (one process, asyncio, a connection each),
router, {_SHARDS} expert servers. The experts compute nothing: a row comes back as the row times the
sum of its weights (`--backend noop`), so that what is timed is the path. `mesh` is one
`AsyncMesh.forward`, from tensor to tensor. `shm` is the same with a client and a router that share
memory (`shared_memory="auto"`), and `grpc` with `data_connections="off"` everywhere, each in a
cluster of its own. `echo` sends the same bytes in chunks of
1 MiB over the same two hops of bare grpc.aio streams, to a relay and from it to {_SHARDS} echo
servers, whole, and one answer back: what gRPC in Python takes at the least, without a tensor, a
gate or a plan. `ratio` is p50 of mesh over p50 of echo, block by block: median (least–largest), and
`shm ratio` and `grpc ratio` those of the other two. The clients share the cores with the servers,
so requests/s is of all of them together."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    gate: str  # "router" or "caller"
    tokens: int
    clients: int
    requests: int  # of each client in a block

    def __str__(self) -> str:
        plural = "s" * (self.clients > 1)
        return f"{self.gate} gates, T = {self.tokens}, {self.clients} client{plural}"


CASES = (
    Case("router", 1, 1, 200),
    Case("router", 1, 64, 10),
    Case("router", 64, 1, 100),
    Case("router", 64, 64, 4),
    Case("caller", 4096, 1, 5),
)
_Request = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Block:
    """Some requests of every client, one after the other, the clients at the same time."""

    latencies_ms: list[float]
    requests_per_s: float


async def _run_block(clients: list[_Request], requests: int) -> Block:
    latencies: list[float] = []

    async def repeat(request: _Request) -> None:
        for _ in range(requests):
            start = time.perf_counter()
            await request()
            latencies.append(1e3 * (time.perf_counter() - start))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request in clients:
            group.create_task(repeat(request))
    return Block(latencies, len(latencies) / (time.perf_counter() - start))


class Bench:
    """The layer in this process, and connections to the cluster and to the relay."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        """Makes the layer and saves it to the folder."""
        self.shape = shape
        self.block = make_block(shape)
        save_block(self.block, folder)
        self.meshes: list[AsyncMesh] = []
        self.shared: list[AsyncMesh] = []  # to the cluster whose hops share memory
        self.plain: list[AsyncMesh] = []  # to the one whose hops are gRPC alone
        self.echoes: list[EchoStream] = []

    async def measure(self, report: Report, case: Case, blocks: int) -> None:
        """Gates one case, then adds its row to the report."""
        rows = make_rows(self.shape, case.tokens, seed=case.tokens)
        _, weights, ids = self.block.gate(rows)
        routing = {"expert_ids": ids, "expert_weights": weights} if case.gate == "caller" else {}
        payload = bytes(rows.nbytes)

        def mesh_request(mesh: AsyncMesh) -> _Request:
            return lambda: mesh.forward(rows, 0, timeout=_TIMEOUT_S, **routing)

        def echo_request(echo: EchoStream) -> _Request:
            return lambda: echo.send(payload)

        expected = (rows.float() * weights.float().sum(1, keepdim=True)).to(rows.dtype)
        meshes = {
            "mesh": self.meshes[: case.clients],
            "shm": self.shared[: case.clients],
            "grpc": self.plain[: case.clients],
        }
        for mesh in chain.from_iterable(meshes.values()):
            output = await mesh.forward(rows, 0, timeout=_TIMEOUT_S, **routing)
            report.gate(str(case), output, expected, _TOLERANCE)
        for echo in self.echoes[: case.clients]:
            if await echo.send(payload) != len(payload):
                raise WrongOutputError("the echo lost bytes")
        clients = {
            "echo": [echo_request(echo) for echo in self.echoes[: case.clients]],
        }
        for name, members in meshes.items():
            clients[name] = [mesh_request(mesh) for mesh in members]
        results: dict[str, list[Block]] = {name: [] for name in clients}
        for _ in range(blocks):
            for name, requests in clients.items():
                results[name].append(await _run_block(requests, case.requests))
        _add(report, case, results)


def _add(report: Report, case: Case, results: dict[str, list[Block]]) -> None:
    p50 = {
        name: [quantile(block.latencies_ms, 0.5) for block in blocks]
        for name, blocks in results.items()
    }
    columns: dict[str, object] = {}
    for name in ("mesh", "shm", "grpc", "echo"):
        latencies = [each for block in results[name] for each in block.latencies_ms]
        columns |= {
            f"{name} p50 ms": round(quantile(latencies, 0.5), 3),
            f"{name} p99 ms": round(quantile(latencies, 0.99), 3),
            f"{name} requests/s": round(
                Spread.of([block.requests_per_s for block in results[name]]).median
            ),
        }
    samples = sum(len(block.latencies_ms) for block in results["mesh"])
    columns["ratio"] = ratios(p50["mesh"], p50["echo"])
    columns["shm ratio"] = ratios(p50["shm"], p50["echo"])
    columns["grpc ratio"] = ratios(p50["grpc"], p50["echo"])
    report.add(str(case), **columns, samples=samples)


class Routers(NamedTuple):
    """Of the three clusters."""

    usual: str
    sharing: str
    plain: str


async def _measure_all(
    bench: Bench, report: Report, routers: Routers, echo: str, blocks: int
) -> None:
    clients = max(case.clients for case in CASES)
    async with AsyncExitStack() as stack:
        for _ in range(clients):
            connecting = connect_async(routers.plain, data_connections="off")
            bench.plain.append(await stack.enter_async_context(connecting))
            connecting = connect_async(routers.sharing, shared_memory="auto")
            bench.shared.append(await stack.enter_async_context(connecting))
            connecting = connect_async(routers.usual)
            bench.meshes.append(await stack.enter_async_context(connecting))
            bench.echoes.append(EchoStream(echo))
            stack.push_async_callback(bench.echoes[-1].close)
        for name, mesh in (("tcp", bench.meshes[0]), ("grpc", bench.plain[0])):
            ways = {server.transport for server in (await mesh.status()).servers}
            if ways != {name}:
                raise WrongOutputError(f"frames travel by {ways}, not {name}")
        for case in CASES:
            await bench.measure(report, case, blocks)


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it, measures, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=9, help="of each side, in turn")
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        theme="path",
        title="The path client → router → shards → back, with experts that compute nothing",
        command=f"python benchmarks/bench_path.py --blocks {arguments.blocks}",
        says=f"{TINY_EXPERTS}, bf16.\n{_SAYS}",
        facts=facts(),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(TINY_EXPERTS, folder)
        with (
            cluster(folder, folder, _SHARDS, backend="noop") as usual,
            cluster(folder, folder, _SHARDS, backend="noop", shared_memory="auto") as sharing,
            cluster(folder, folder, _SHARDS, backend="noop", data_connections="off") as plain,
            echo_over_two_hops(folder, _SHARDS) as echo,
        ):
            routers = Routers(usual, sharing, plain)
            uvloop.run(_measure_all(bench, report, routers, echo, arguments.blocks))
    report.publish(arguments)


if __name__ == "__main__":
    main()
