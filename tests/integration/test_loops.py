"""Every long-lived loop of every service is ended by an error, and goes on or says so and ends.

tests/repo/test_loops.py finds the loops; a new one is missing here until it is tried, too.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import expertmesh
from expert_service.__main__ import _ended
from expertmesh.config import AutoscaleConfig, RebalanceConfig
from expertmesh.errors import InternalError, LeaseLostError
from expertmesh.rpc import loop
from expertmesh.rpc.tasks import TaskSet
from fleet import supervisor as supervising
from fleet.scaling import ServerPlan
from fleet.supervisor import Supervisor
from router_service.server import RouterServer, open_model
from tests.checkpoints import make_checkpoint
from tests.mesh import LOCAL, LocalMesh, local_mesh, wait_until
from tests.repo.test_loops import kept_loops
from tests.scrape import scrape

ROOT = Path(__file__).parents[2]
ROWS, LAYER = 5, 1
GOES_ON_S = 10.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loops") / "checkpoint"
    make_checkpoint("deepseek_v3", folder)
    return folder


@pytest.fixture(scope="module")
def mesh(path: Path) -> Iterator[LocalMesh]:
    quick = RebalanceConfig(window_s=0.05, least_assignments=1 << 40)
    with local_mesh(path, metrics=True, rebalance=quick) as running:
        yield running


class Breaks:
    """Takes a method's place: raises once, then calls it and counts."""

    def __init__(self, owner: Any, name: str, error: BaseException) -> None:
        self.fired = threading.Event()
        self.calls_since = 0
        self._method, self._error = getattr(owner, name), error
        setattr(owner, name, self)
        self.undo = lambda: setattr(owner, name, self._method)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not self.fired.is_set():
            self.fired.set()
            raise self._error
        self.calls_since += 1
        return self._method(*arguments, **named)


def _links(mesh: LocalMesh) -> Any:
    """One of a router's links, which is told to connect anew."""
    ((_, link), *_) = mesh.routers[0].router.pool.links()
    loop.shared_loop().call_soon_threadsafe(link._moved.set)
    return link


#: By loop: who has it, and what it calls at each turn.
LOOPS: dict[str, tuple[str, Callable[[LocalMesh], Any], str]] = {
    "balance": ("controller", lambda m: m.controller.controller, "close_windows"),
    "look after servers": ("controller", lambda m: m.controller.controller, "mark_lost"),
    "look after the state file": ("controller", lambda m: m.controller._store.file, "check"),
    "drop leftovers": ("controller", lambda m: m.controller.controller, "leaving"),
    "rebalance": ("controller", lambda m: m.controller.rebalancing._rebalancer, "observe"),
    "watch controller": ("router", lambda m: m.routers[0]._link, "_apply"),
    "report counts": ("router", lambda m: m.routers[0]._link, "flush"),
    "follow health": ("router", lambda m: m.routers[0].router.pool, "wait_change"),
    "server link": ("router", _links, "_serve"),
    "announce": ("expert", lambda m: m.servers[0]._announcer, "announce"),
}


def test_every_kept_loop_is_tried_here() -> None:
    assert kept_loops(ROOT) == LOOPS.keys()


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_is_ended_by_an_error_goes_on(
    mesh: LocalMesh, name: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    service, owner, method = LOOPS[name]
    running: Any = {
        "controller": mesh.controller, "router": mesh.routers[0], "expert": mesh.servers[0],
    }[service]  # fmt: skip
    metric = f"expertmesh_{service}_loop_failures_total"
    failed = scrape(running.metrics_address).value(metric, loop=name)

    with caplog.at_level(logging.ERROR):
        broken = Breaks(owner(mesh), method, error)
        assert broken.fired.wait(GOES_ON_S), "the fault has fired"
        again = 2 if method != "_serve" else 1
        wait_until(lambda: broken.calls_since >= again, GOES_ON_S, "going on")
    loop.shared_loop().call_soon_threadsafe(broken.undo)

    assert scrape(running.metrics_address).value(metric, loop=name) == failed + 1
    said = [record for record in caplog.records if f"the loop '{name}" in record.message]
    assert len(said) == 1
    assert said[0].exc_info is not None, "with its traceback"
    _serves_and_counts(mesh)


def _serves_and_counts(mesh: LocalMesh) -> None:
    """Requests are answered, counts are exact, and the controller is heard."""
    with expertmesh.connect(mesh.address) as client:
        wait_until(lambda: client.status().ready, GOES_ON_S, "ready")
        top_k = client.describe().layers[LAYER].top_k
        wait_until(lambda: client.status().controller_connected, GOES_ON_S, "connected")
        before = client.load().counts.get(LAYER, torch.zeros(1)).sum()
        client.forward(torch.randn(ROWS, 64), LAYER)
        assert int(client.load().counts[LAYER].sum() - before) == ROWS * top_k
        wait_until(lambda: client.status().balance_alive, GOES_ON_S, "balancing")


def test_a_router_that_was_refused_asks_again(mesh: LocalMesh, path: Path) -> None:
    """The controller may be replaced by one of its fleet; nobody need restart the router."""
    controller = mesh.controller.controller
    digest = controller._digest

    async def start() -> RouterServer:
        controller._digest = "of another checkpoint"
        router = RouterServer(
            open_model(path, mesh.servers[0]._dtype), router_id="late", host="127.0.0.1",
            controller=mesh.controller.address, rpc=LOCAL,
        )  # fmt: skip
        await router.start()
        return router

    router = loop.run(start())
    try:
        wait_until(lambda: router._link.refused is not None, GOES_ON_S, "refused")
        controller._digest = digest
        wait_until(lambda: not router.router.missing(), 2 * GOES_ON_S, "ready")
        assert router._link.refused is None
    finally:
        controller._digest = digest
        loop.run(router.stop())


@pytest.mark.parametrize("name", ["look after servers", "report counts"])
def test_status_says_which_loop_has_failed_until_it_has_got_over_it(
    mesh: LocalMesh, name: str
) -> None:
    _, owner, method = LOOPS[name]

    with expertmesh.connect(mesh.address) as client:
        broken = Breaks(owner(mesh), method, ZeroDivisionError("a bug"))
        said = f"the loop '{name}' has failed: ZeroDivisionError('a bug')"
        wait_until(lambda: said in client.status().problem, GOES_ON_S, "said")
        wait_until(lambda: said not in client.status().problem, GOES_ON_S, "over")
    loop.shared_loop().call_soon_threadsafe(broken.undo)

    assert broken.fired.is_set()
    assert broken.calls_since > 0


def test_a_loop_that_fails_again_and_again_is_started_ever_less_often_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pauses: list[float] = []

    async def run() -> None:
        raise ZeroDivisionError("a bug")

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    async def fail_ten_times() -> TaskSet:
        tasks = TaskSet(note)
        tasks.keep(run, "poll")
        while len(pauses) < 10:  # noqa: ASYNC110 (every turn of the loop is a try)
            await asyncio.sleep(0)
        await tasks.close()
        return tasks

    tasks = asyncio.run(fail_ten_times())

    assert pauses[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert tasks.failures["poll"] == len(pauses)
    assert len([each for each in caplog.records if "'poll'" in each.message]) == 1


def test_a_loop_that_is_cancelled_by_its_owner_ends() -> None:
    async def cancel() -> bool:
        tasks = TaskSet()
        task = tasks.keep(asyncio.Event().wait, "poll")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,), timeout=1.0)
        return task.cancelled()

    assert asyncio.run(cancel())


def test_a_server_whose_device_thread_has_ended_says_so_and_its_process_ends(
    mesh: LocalMesh, path: Path
) -> None:
    server = mesh.start_server("lone", 0, 1, path)
    wait_until(lambda: server.state == "ready", GOES_ON_S, "ready")
    broken = Breaks(server._runner._waiting, "next", ZeroDivisionError("a bug"))

    async def ended() -> object:
        server._runner._arrivals.put(None)  # a turn: the thread looks at what waits
        return await asyncio.wait_for(_ended(server), GOES_ON_S)

    reason = loop.run(ended())

    assert broken.fired.is_set()
    assert isinstance(reason, InternalError), "exit code 1 says that somebody must start it again"
    assert server.state == "failed"
    assert "incident" in server.status().error
    with expertmesh.connect(mesh.address) as client:
        wait_until(
            lambda: {s.server_id: s.state for s in client.status().servers}["lone"] == "failed",
            GOES_ON_S, "known to have failed",
        )  # fmt: skip


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), LeaseLostError("taken"), OSError()])
def test_no_error_ends_the_supervisor(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class NoServers:
        def names(self) -> set[str]:
            return set()

        def start(self, name: str, slots: object) -> None: ...

        def end(self, name: str, graceful: bool) -> None: ...

    monkeypatch.setattr(supervising, "TURN_S", 0.01)
    with expertmesh.checkpoint.Checkpoint.open(path) as opened:
        plan = ServerPlan(opened.spec, 1)
    supervisor = Supervisor("127.0.0.1:1", plan, AutoscaleConfig(), NoServers(), owner="test")
    stopped, turns, problems = threading.Event(), [0], []

    def turn() -> None:
        turns[0] += 1
        problems.append(supervisor.report.problem)
        if turns[0] == 1:
            raise error
        if turns[0] == 3:
            stopped.set()

    monkeypatch.setattr(supervisor, "turn", turn)
    thread = threading.Thread(target=supervisor.run, args=(stopped,))
    thread.start()
    thread.join(GOES_ON_S)

    assert not thread.is_alive()
    assert turns == [3]
    assert [bool(problem) for problem in problems] == [False, True, False]
