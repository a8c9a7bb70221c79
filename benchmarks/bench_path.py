"""What the path itself costs: a layer of tiny experts, beside a bare gRPC stream.

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
from pathlib import Path

# Before torch is imported: threads that wait sleep, they take no core from the servers.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from echo import EchoStream
from harness import Report, Spread, WrongOutputError, quantile, ratios
from layer import TINY_EXPERTS, Shape, make_block, make_rows, save_block
from machine import facts
from services import cluster, service

from expert_service.kernels import create_backend
from expert_service.shard import ExpertShard
from expertmesh.checkpoint import Checkpoint
from expertmesh.client import AsyncMesh, connect_async
from expertmesh.placement import initial_parts

_TOLERANCE = 1e-2  # bf16
_SHARDS = 2
_TIMEOUT_S = 120.0
_SAYS = f"""\
Every process is on one machine, without Ray: clients (one process, asyncio, a connection each),
router, {_SHARDS} expert servers of one thread. `mesh` is one `AsyncMesh.forward`, from tensor to
tensor. `echo` sends the same bytes over a bare grpc.aio stream to one process and back, in chunks
of 1 MiB, with no tensor, no gate and no second hop: what gRPC in Python takes at the least, and not
a system of the same use. `ratio` is p50 of mesh over p50 of echo, block by block: median
(least–largest). The experts are tiny, not absent: `experts ms` is what one shard's own part takes,
alone in a process, and is in the time of the mesh. The clients share the cores with the servers, so
requests/s is of all of them together."""


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
    """The layer in this process, and connections to the cluster and to the echo server."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        """Makes the layer and saves it to the folder."""
        self.shape = shape
        self.block = make_block(shape)
        self.block.config._experts_implementation = "eager"
        save_block(self.block, folder)
        checkpoint = Checkpoint.open(folder)
        backend = create_backend("auto", "cpu", checkpoint.spec.dtype, checkpoint.spec, 1)
        self._part = initial_parts(checkpoint.spec, _SHARDS)[0]
        self._shard = ExpertShard(checkpoint.spec, self._part, backend)
        self._shard.load(checkpoint.read_expert, lambda _: None)
        self.meshes: list[AsyncMesh] = []
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

        expected = self.block.experts(rows, ids, weights)
        for mesh in self.meshes[: case.clients]:
            output = await mesh.forward(rows, 0, timeout=_TIMEOUT_S, **routing)
            report.gate(str(case), output, expected, _TOLERANCE)
        for echo in self.echoes[: case.clients]:
            if await echo.send(payload) != len(payload):
                raise WrongOutputError("the echo lost bytes")
        clients = {
            "echo": [echo_request(echo) for echo in self.echoes[: case.clients]],
            "mesh": [mesh_request(mesh) for mesh in self.meshes[: case.clients]],
        }
        results: dict[str, list[Block]] = {name: [] for name in clients}
        for _ in range(blocks):
            for name, requests in clients.items():
                results[name].append(await _run_block(requests, case.requests))
        _add(report, case, results, self._experts_ms(rows, ids, weights))

    def _experts_ms(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> float:
        """One shard's part of a batch, median of some."""
        held = torch.tensor([slot.expert for slot in self._part])
        asked = torch.where(torch.isin(ids, held), ids, -1).int()
        seconds = []
        for _ in range(21):
            start = time.perf_counter()
            self._shard.execute(0, rows, asked, weights)
            seconds.append(time.perf_counter() - start)
        return 1e3 * Spread.of(seconds).median


def _add(report: Report, case: Case, results: dict[str, list[Block]], experts_ms: float) -> None:
    p50 = {
        name: [quantile(block.latencies_ms, 0.5) for block in blocks]
        for name, blocks in results.items()
    }
    columns: dict[str, object] = {}
    for name in ("mesh", "echo"):
        latencies = [each for block in results[name] for each in block.latencies_ms]
        columns |= {
            f"{name} p50 ms": round(quantile(latencies, 0.5), 3),
            f"{name} p99 ms": round(quantile(latencies, 0.99), 3),
            f"{name} requests/s": round(
                Spread.of([block.requests_per_s for block in results[name]]).median
            ),
        }
    samples = sum(len(block.latencies_ms) for block in results["mesh"])
    report.add(
        str(case), **columns, ratio=ratios(p50["mesh"], p50["echo"]),
        **{"experts ms": round(experts_ms, 3)}, samples=samples,
    )  # fmt: skip


async def _measure_all(bench: Bench, report: Report, router: str, echo: str, blocks: int) -> None:
    clients = max(case.clients for case in CASES)
    async with AsyncExitStack() as stack:
        for _ in range(clients):
            bench.meshes.append(await stack.enter_async_context(await connect_async(router)))
            bench.echoes.append(EchoStream(echo))
            stack.push_async_callback(bench.echoes[-1].close)
        for case in CASES:
            await bench.measure(report, case, blocks)


@torch.no_grad()
def main() -> None:
    """Makes the layer, serves it, measures, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=9, help="of each side, in turn")
    parser.add_argument("--hardware", help="writes benchmarks/results, e.g. 2core-epyc")
    parser.add_argument("--json", type=Path, help="writes JSON there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        theme="path",
        title="The path client → router → shards → back, with tiny experts, on the CPU",
        command=f"python benchmarks/bench_path.py --blocks {arguments.blocks}",
        says=f"{TINY_EXPERTS}, bf16.\n{_SAYS}",
        facts=facts(),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(TINY_EXPERTS, folder)
        with (
            cluster(folder, folder, _SHARDS) as router,
            service(folder, str(Path(__file__).parent / "echo.py")) as echo,
        ):
            asyncio.run(_measure_all(bench, report, router, echo, arguments.blocks))
    print(report.markdown())
    if arguments.json:
        report.write_json(arguments.json)
    if arguments.hardware:
        report.write(arguments.hardware)


if __name__ == "__main__":
    main()
