"""The load controller's disk is full, or its file is locked, and then it is not: no restart.

A real controller process, on a real small file system. Requests are answered all the while, no
count is lost, nothing is told that was not stored, and windows, beats and the watch over silent
servers are alive again once there is room.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import expertmesh
from expert_service.server import ExpertServer
from expertmesh.client import AsyncMesh
from expertmesh.errors import UnavailableError
from expertmesh.rpc import loop
from expertmesh.rpc.channel import open_channel
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import control_pb2_grpc
from fleet import control
from router_service.server import RouterServer, open_model
from tests import faults
from tests.checkpoints import make_checkpoint
from tests.mesh import LOCAL, start_server_at
from tests.processes import Service

pytestmark = pytest.mark.chaos

LAYER, ROWS, HIDDEN = 1, 4, 64
SETTINGS = ("--balance", "adaptive", "--set", "window_tokens=8")
FAULT_S = 6.0  # past the time after which a silent server is lost; several tries of who writes
SOON_S = 15.0


@contextmanager
def _full(disk: Path) -> Iterator[None]:
    filler = faults.fill(disk)
    yield
    filler.unlink()


@contextmanager
def _locked(disk: Path) -> Iterator[None]:
    other = sqlite3.connect(disk / "state.sqlite", isolation_level=None, timeout=5.0)
    other.execute("BEGIN EXCLUSIVE")
    yield
    other.execute("ROLLBACK")
    other.close()


@dataclass
class Load:
    """Requests without a pause, each answer compared with the first one's."""

    mesh: AsyncMesh
    answered: int = 0
    going: bool = True
    hidden: torch.Tensor = field(default_factory=lambda: torch.randn(ROWS, HIDDEN))

    async def run(self) -> None:
        """Until told to stop."""
        ids, weights = torch.tensor([[0, 1]] * ROWS), torch.full((ROWS, 2), 0.5)
        truth = None
        while self.going:
            answer = await self.mesh.forward(
                self.hidden, LAYER, expert_ids=ids, expert_weights=weights, timeout=5.0
            )
            truth = answer if truth is None else truth
            torch.testing.assert_close(answer, truth, rtol=1e-4, atol=1e-5)
            await self.mesh.forward(self.hidden, LAYER, timeout=5.0)  # these move biases
            self.answered += 2
            await asyncio.sleep(0.01)


async def _until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, f"not {what} within {SOON_S} s"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def _served(
    path: Path, controller: str
) -> AsyncIterator[tuple[RouterServer, list[ExpertServer]]]:
    """A router and two servers that hold the same."""
    servers = [await start_server_at(path, controller, name, 0, 1) for name in ("s0", "s1")]
    router = RouterServer(
        open_model(path), router_id="r0", controller=controller, host="127.0.0.1", rpc=LOCAL
    )
    await router.start()
    try:
        await _until(lambda: not router.router.missing(), "ready")
        await _until(lambda: all(link.connected for _, link in router.router.pool.links()), "up")
        yield router, servers
    finally:
        await router.stop()
        for server in servers:
            await server.stop()


def _state_of(router: RouterServer, server: str) -> str:
    link = router.router.pool.link(server)
    return "" if link is None else link.announced.state


async def _go_through(
    path: Path, disk: Path, fault: Callable[[Path], AbstractContextManager[None]], said: str,
    controller: Service,
) -> int:  # fmt: skip
    """Before, during and after the fault. The assignments that were counted in the end."""
    async with (
        _served(path, controller.address) as (router, servers),
        expertmesh.connect_async(router.address) as mesh,
        open_channel(controller.address) as channel,
    ):
        stub, link = control_pb2_grpc.ControlServiceStub(channel), router._link
        load = Load(mesh)
        loading = asyncio.ensure_future(load.run())
        await _until(lambda: router.router.snapshot.bias_version > 3, "balancing")
        assert link.balance_alive

        with fault(disk):
            await _until(lambda: said in link.problem, "said by the controller")  # it has fired
            await servers[1]._tasks.close()  # it answers on, and announces nothing
            version, before = router.router.snapshot.bias_version, load.answered
            slowest = 0.0
            end = time.monotonic() + FAULT_S
            while time.monotonic() < end:
                asked_at = time.monotonic()
                await stub.GetClusterLoad(pb.GetClusterLoadRequest(), timeout=5.0)
                slowest = max(slowest, time.monotonic() - asked_at)
                await asyncio.sleep(0.05)
            assert link.connected
            assert not link.balance_alive
            assert said in (await mesh.status()).problem
            assert router.router.snapshot.bias_version == version, "nothing told, nothing stored"
            assert load.answered > before + 20, "serving goes on"
            assert slowest < 1.0, "nobody waits for the file"
            with pytest.raises(UnavailableError, match=said):
                await mesh.load()
            with pytest.raises(UnavailableError, match=said):
                await _set_mode(controller.address, "frozen")
            assert _state_of(router, "s1") == "ready", "told when it can be stored"

        await _until(lambda: not link.problem, "over")
        await _until(lambda: link.balance_alive, "beating")
        await _until(lambda: router.router.snapshot.bias_version > version + 2, "balancing again")
        await _until(lambda: _state_of(router, "s1") == "lost", "seen to be silent")
        load.going = False
        await loading  # no answer was wrong or missing
        top_k = mesh.describe().layers[LAYER].top_k
        counted = await mesh.load()
        assert await _set_mode(controller.address, "frozen") > version
        assert controller.process.poll() is None, "it is the same process"
        own = router.router.counts
        assert int(own.answered_rows) == ROWS * own.answered_requests
        total = int(counted.counts[LAYER].sum())
        assert total == own.answered_requests // 2 * ROWS * (2 + top_k)
        return total


async def _set_mode(address: str, mode: str) -> int:
    return await asyncio.to_thread(control.set_balance_mode, address, mode)


FAULTS = {"full": (_full, "SQLITE_FULL"), "locked": (_locked, "SQLITE_BUSY")}


@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS)
def test_the_controller_outlives_a_file_that_cannot_be_written(
    tmp_path: Path, fault: Callable[[Path], AbstractContextManager[None]], said: str
) -> None:
    path, disk = tmp_path / "checkpoint", tmp_path / "disk"
    make_checkpoint("deepseek_v3", path)
    with faults.small_disk(disk, "8m"):
        start = ("load_controller", "--state", str(disk / "state.sqlite"), *SETTINGS)
        with Service(*start) as controller:
            counted = loop.run(_go_through(path, disk, fault, said, controller))
            controller.kill()
        with Service(*start) as again:
            loop.run(_knows(again.address, counted))


async def _knows(address: str, counted: int) -> None:
    """What was counted was stored."""
    async with open_channel(address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        found = await stub.GetClusterLoad(pb.GetClusterLoadRequest(), timeout=5.0)
    assert {e.layer: sum(e.counts) + sum(e.caller_gated_counts) for e in found.layers} == {
        LAYER: counted
    }
