"""The load controller is killed with SIGKILL at fifty instants, in the middle of its writing.

After each restart its state is one that it had published, or the next one: version, deltas and
counts together. What routers are told never goes back, and requests never notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import torch

import expertmesh
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.rpc import loop
from expertmesh.rpc.channel import open_channel
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import control_pb2_grpc, router_pb2
from load_controller.policy import sign
from router_service.server import RouterServer, open_model
from tests.checkpoints import make_checkpoint
from tests.mesh import LOCAL, start_server_at
from tests.prefork import Forked, Prefork

pytestmark = pytest.mark.chaos

KILLS = 50
LAYERS = range(101, 109)  # none that the checkpoint has: what is reported of them is ours alone
EXPERTS, TOP_K = 8, 2
RATE = 2.0**-10  # sums of it are exact in float32
SETTINGS = ("--balance", "adaptive", "--set", "window_tokens=4", "--set", f"update_rate={RATE}",
            "--set", "window_s=1000")  # fmt: skip


@dataclass(frozen=True)
class State:
    """What a controller must know all of, or nothing: the oracle of one version."""

    version: int
    totals: dict[int, tuple[int, ...]]
    deltas: dict[int, tuple[float, ...]]

    def after_report(self, totals: dict[int, tuple[int, ...]]) -> State:
        """A report with those totals, which closes one window of every layer."""
        moved = {}
        for layer, total in totals.items():
            news = torch.tensor(total) - torch.tensor(self.totals.get(layer, (0,) * EXPERTS))
            before = torch.tensor(self.deltas.get(layer, (0.0,) * EXPERTS))
            moved[layer] = tuple(sign(before, news, RATE).tolist())
        # A delta of nothing but zeros is not sent.
        return State(self.version + 1, totals, {at: d for at, d in moved.items() if any(d)})

    def after_reset(self) -> State:
        """Every delta taken back."""
        return State(self.version + 1, self.totals, {})


@dataclass
class Reporter:
    """A router that does nothing but report, one report after the other."""

    stub: control_pb2_grpc.ControlServiceStub
    state: State
    operations: int = 0
    sequence: int = 0
    known: dict[int, dict[int, tuple[float, ...]]] = field(default_factory=dict)
    following: State | None = None  # what the operation on its way leads to

    async def run(self) -> None:
        """Until the controller is gone."""
        while True:
            self.operations += 1
            if self.operations % 7 == 0:
                await self._expecting(
                    self.state.after_reset(),
                    self.stub.SetBalanceMode(pb.SetBalanceModeRequest(reset=True), timeout=5.0),
                )
            else:
                report = self._report()
                totals = {entry.layer: tuple(entry.counts) for entry in report.layers}
                await self._expecting(
                    self.state.after_report(totals),
                    self.stub.ReportAssignments(report, timeout=5.0),
                )

    async def _expecting(self, following: State, call: grpc.aio.UnaryUnaryCall) -> None:  # type: ignore[type-arg]
        self.following = following
        self.known[following.version] = following.deltas
        await call
        self.state, self.following = following, None

    def _report(self) -> pb.ReportAssignmentsRequest:
        self.sequence += 1
        chance = np.random.default_rng(self.sequence)
        layers = []
        for layer in LAYERS:
            total = np.array(self.state.totals.get(layer, (0,) * EXPERTS))
            total += chance.multinomial(16, [1 / EXPERTS] * EXPERTS)
            layers.append(router_pb2.LayerLoad(layer=layer, counts=total.tolist(), top_k=TOP_K))
        return pb.ReportAssignmentsRequest(
            source="reporter", incarnation="i", sequence=self.sequence, layers=layers
        )


async def _stored(stub: control_pb2_grpc.ControlServiceStub, digest: str) -> State:
    """What the controller knows: its counts, and the bias that it tells a new watcher."""
    load = await stub.GetClusterLoad(pb.GetClusterLoadRequest(), timeout=5.0)
    watch = stub.WatchCluster(_watch_request("reader", digest))
    first = await watch.read()
    watch.cancel()
    assert first.bias.version == load.bias_version
    return State(
        load.bias_version,
        {entry.layer: tuple(entry.counts) for entry in load.layers if entry.layer in LAYERS},
        {entry.layer: tuple(entry.delta) for entry in first.bias.layers},
    )


def _watch_request(name: str, digest: str) -> pb.WatchClusterRequest:
    return pb.WatchClusterRequest(
        router_id=name, incarnation="i", protocol_version=PROTOCOL_VERSION, checkpoint_digest=digest
    )


async def _watch(address: str, digest: str, on: Callable[[pb.WatchClusterResponse], None]) -> None:
    """Follows the controller over its deaths, as a router does."""
    async with open_channel(address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        while True:
            with suppress(grpc.aio.AioRpcError):
                async for message in stub.WatchCluster(_watch_request("watcher", digest)):
                    on(message)
            await asyncio.sleep(0.01)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 (it looks into services that have no event)
            await asyncio.sleep(0.002)


@asynccontextmanager
async def _served(path: Path, controller: str) -> AsyncIterator[RouterServer]:
    """A router and an expert server that belong to that controller."""
    server = await start_server_at(path, controller, "s0", 0, 1)
    router = RouterServer(
        open_model(path), router_id="router-0", controller=controller, host="127.0.0.1", rpc=LOCAL
    )
    await router.start()
    try:
        await _until(lambda: not router.router.missing())
        yield router
    finally:
        await router.stop()
        await server.stop()


async def _serve_on(address: str, answered: list[int]) -> None:
    """Requests without a pause, gated by the caller so that they move no bias."""
    ids, weights = torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)
    async with expertmesh.connect_async(address) as mesh:
        while True:
            await mesh.forward(
                torch.randn(4, 64), 1, expert_ids=ids, expert_weights=weights, timeout=2.0
            )
            answered.append(1)
            await asyncio.sleep(0.005)


async def _kill_over_and_over(path: Path, state: Path, prefork: Prefork) -> None:
    def start() -> Forked:
        return prefork.start("--state", str(state), *SETTINGS)

    controller = start()
    address = controller.address
    digest = open_model(path).digest
    told: list[pb.WatchClusterResponse] = []
    answered: list[int] = []
    known: dict[int, dict[int, tuple[float, ...]]] = {1: {}}
    expected, sequence, busy = State(1, {}, {}), 0, 0
    async with _served(path, address) as router, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_watch(address, digest, told.append)),
            group.create_task(_serve_on(router.address, answered)),
        ]
        for kill in range(KILLS):
            async with open_channel(address) as channel:
                stub = control_pb2_grpc.ControlServiceStub(channel)
                await _until(lambda v=expected.version: router.router.snapshot.bias_version >= v)
                reporter = Reporter(stub, expected, operations=kill, sequence=sequence, known=known)
                reporting = asyncio.ensure_future(reporter.run())
                await asyncio.sleep(0.005 + 0.0011 * kill)  # every phase of an operation
                controller.kill()
                with pytest.raises(grpc.aio.AioRpcError):
                    await reporting
            before = len(answered)
            controller = start()
            async with open_channel(address) as channel:
                stub = control_pb2_grpc.ControlServiceStub(channel)
                found = await _stored(stub, digest)
            assert controller.address == address
            assert found in (reporter.state, reporter.following), f"after kill {kill}"
            busy += reporter.state.version > expected.version
            expected, sequence = found, reporter.sequence
            await _until(lambda n=before: len(answered) > n)
        await _until(lambda: router.router.snapshot.bias_version == expected.version)
        for task in tasks:
            task.cancel()
    controller.kill()

    versions = [message.bias.version for message in told if message.HasField("bias")]
    directories = [m.directory.version for m in told if m.HasField("directory")]
    assert versions == sorted(versions)
    assert directories == sorted(directories)
    for message in told:
        if message.HasField("bias"):
            deltas = {entry.layer: tuple(entry.delta) for entry in message.bias.layers}
            assert deltas == known[message.bias.version]
    assert busy >= KILLS / 2, "the kills came while it worked"


def test_a_controller_killed_at_any_instant_comes_back_with_a_whole_state(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    make_checkpoint("deepseek_v3", path)
    with Prefork("load_controller") as prefork:
        loop.run(_kill_over_and_over(path, tmp_path / "state.sqlite", prefork))
