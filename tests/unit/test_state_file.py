"""While a state file cannot be written nothing is lost or half done, and all goes on afterwards.

Everything that the load controller stores is tried on every fault: what it publishes stays as it
was, the same call succeeds when the fault is over, and a restarted controller knows it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from expertmesh.config import BalanceConfig
from expertmesh.errors import UnavailableError
from expertmesh.model import PROTOCOL_VERSION, Slot
from expertmesh.rpc import loop
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import expert_pb2, router_pb2
from load_controller.controller import FORGET_AFTER_S, LOST_AFTER_S, LoadController
from load_controller.migration import Copy, Step
from load_controller.scaling import Bounds
from load_controller.server import ControllerServer
from load_controller.store import Store
from tests import faults
from tests.mesh import LOCAL

LAYER = 2


class Clock:
    """Seconds that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def _controller(path: Path, clock: Clock) -> tuple[LoadController, Store]:
    store = Store(path, clock)
    balance = BalanceConfig(mode="adaptive", window_tokens=1)
    return LoadController(store, balance, lambda: None), store


def _announce(server: str, state: str = "ready", experts: tuple[int, ...] = (0, 1)) -> Any:
    return pb.AnnounceServerRequest(
        server=router_pb2.ServerStatus(
            server_id=server, incarnation="i1", endpoint="h:1", state=state
        ),
        protocol_version=PROTOCOL_VERSION,
        checkpoint_digest="digest",
        started_at_ns=1,
        layers=[expert_pb2.LayerSlots(layer=LAYER, experts=experts)],
    )


def _report(sequence: int) -> pb.ReportAssignmentsRequest:
    counts = [8 * sequence, sequence]
    layer = router_pb2.LayerLoad(layer=LAYER, counts=counts, caller_gated_counts=[0, 0], top_k=1)
    return pb.ReportAssignmentsRequest(
        source="r0", incarnation="i", sequence=sequence, layers=[layer]
    )


def _executions(sequence: int) -> pb.ReportExecutionsRequest:
    layer = pb.LayerExecutions(layer=LAYER, counts=[sequence, sequence])
    return pb.ReportExecutionsRequest(
        source="s0", incarnation="i", sequence=sequence, layers=[layer]
    )


def _ready(controller: LoadController) -> None:
    """Two servers, one that drains, counts, a published bias."""
    controller.announce(_announce("s0"), now=0.0)
    controller.announce(_announce("s1"), now=0.0)
    controller.announce(_announce("old", "draining"), now=0.0)
    controller.take_assignments(_report(1), now=0.0)
    controller.take_executions(_executions(1))


def _mark_lost(controller: LoadController) -> None:
    controller.announce(_announce("s1"), now=LOST_AFTER_S)
    controller.mark_lost(LOST_AFTER_S + 0.1)


def _forget(controller: LoadController) -> None:
    for server in ("s0", "s1"):
        controller.announce(_announce(server), now=FORGET_AFTER_S)
    controller.mark_lost(FORGET_AFTER_S + 0.1)


COPY = Copy("s1", Slot(LAYER, 1))
#: Whatever the load controller stores. A new method that stores belongs here.
OPERATIONS: dict[str, Callable[[LoadController], object]] = {
    "a server comes": lambda c: c.announce(_announce("s2"), now=1.0),
    "a server holds other slots": lambda c: c.announce(_announce("s1", experts=(0,)), now=1.0),
    "a server is lost": _mark_lost,
    "a drained server is forgotten": _forget,
    "a server drains": lambda c: c.mark_draining("s0"),
    "a report closes a window": lambda c: c.take_assignments(_report(2), now=1.0),
    "executions are reported": lambda c: c.take_executions(_executions(2)),
    "the mode changes": lambda c: c.set_mode("frozen"),
    "deltas are taken back": lambda c: c.set_mode("", reset=True),
    "copies will be loaded": lambda c: c.expect([COPY]),
    "a step is switched": lambda c: c.switch(Step(LAYER, loads=(), drops=(COPY,))),
    "rebalancing is switched on": lambda c: c.set_rebalancing(True),
    "a lease is taken": lambda c: c.scaling.take("owner", 10.0, now=0.0),
    "bounds are set": lambda c: c.scaling.set_bounds(Bounds(1, 3)),
}
FAULTS: dict[str, Callable[[Store], AbstractContextManager[Any]]] = {
    "full": faults.full,
    "locked": faults.locked,
    "read-only": faults.read_only,
    **{
        f"statement {number}": lambda store, number=number: faults.failing_at(store, number)
        for number in range(1, 9)
    },
}


def _published(controller: LoadController) -> list[object]:
    """Everything that anybody is told, and what decides what is told next."""
    progress = {
        layer: (each.delta.tolist(), each.windows)
        for layer, each in controller.balancer.progress().items()
    }
    scaling = controller.scaling
    return [
        controller.directory().SerializeToString(deterministic=True),
        controller.placement().SerializeToString(deterministic=True),
        controller.bias().SerializeToString(deterministic=True),
        controller.load(now=0.0).SerializeToString(deterministic=True),
        (controller.bias_version, controller.directory_version, controller.epoch),
        (progress, controller.balancer.mode, controller.balancer.closed_windows),
        (scaling.owner, scaling.fence, scaling.bounds),
        controller.rebalancing_setting(),
        controller.leaving(),
    ]


def _refused(
    operation: Callable[[LoadController], object], controller: LoadController
) -> UnavailableError | None:
    try:
        operation(controller)
    except UnavailableError as error:
        return error
    return None


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_stored_did_not_happen_and_happens_afterwards(
    tmp_path: Path, fault: Any, operation: Callable[[LoadController], object]
) -> None:
    clock = Clock()
    controller, store = _controller(tmp_path / "state.sqlite", clock)
    _ready(controller)
    before = _published(controller)

    with fault(store) as failing:
        refused = _refused(operation, controller)
        if refused is not None:
            assert "cannot write its state file" in refused.message
            assert _published(controller) == before
            assert store.file.failures == 1
        else:  # it has fewer statements than that, or found room for itself
            assert fault is faults.full if failing is None else not failing.fired
    clock.now += 1.0
    operation(controller)  # again, as whoever asked for it does
    after = _published(controller)
    store.close()

    restarted, store = _controller(tmp_path / "state.sqlite", clock)
    assert after[4] == _published(restarted)[4], "versions go on where they were"
    assert after[2] == _published(restarted)[2]
    assert [list(e.counts) for e in restarted.load(0.0).layers] == [
        list(e.counts) for e in controller.load(0.0).layers
    ]
    store.close()


@pytest.mark.slow
def test_every_fault_keeps_most_of_what_is_stored_from_being_stored(tmp_path: Path) -> None:
    fired = dict.fromkeys(FAULTS, 0)
    for name, fault in FAULTS.items():
        for number, operation in enumerate(OPERATIONS.values()):
            controller, store = _controller(tmp_path / f"{name}-{number}", Clock())
            _ready(controller)
            with fault(store):
                fired[name] += _refused(operation, controller) is not None
            store.close()

    assert fired["locked"] == fired["read-only"] == len(OPERATIONS)
    assert fired["statement 1"] == fired["statement 2"] == len(OPERATIONS)
    assert fired["full"] >= 2  # small things find room in pages that are there: as they shall
    assert fired["statement 5"] >= 4


def test_windows_count_a_report_once_that_could_not_be_stored_at_first(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path / "state.sqlite", clock)
    controller = LoadController(store, BalanceConfig(window_tokens=1000), lambda: None)
    controller.take_assignments(_report(1), now=0.0)

    for number in range(1, 4):
        with faults.failing_at(store, number), pytest.raises(UnavailableError):
            controller.take_assignments(_report(2), now=0.0)
        clock.now += 1.0
    controller.take_assignments(_report(3), now=0.0)

    window = controller.balancer.layers[LAYER].window
    assert window is not None
    assert window.counts.tolist() == [24, 3]
    assert list(controller.load(0.0).layers[0].counts) == [24, 3]


def test_a_router_that_comes_is_served_before_others_can_hear_of_it(tmp_path: Path) -> None:
    clock = Clock()
    controller, store = _controller(tmp_path / "state.sqlite", clock)
    _ready(controller)
    version = controller.directory_version

    with faults.locked(store):
        controller.add_router(
            pb.WatchClusterRequest(router_id="r1", incarnation="i", endpoint="h:9")
        )
        assert controller.directory_version == version
        clock.now += 1.0
        with pytest.raises(UnavailableError):
            controller.renew_directory()
    clock.now += 1.0
    controller.renew_directory()

    assert list(controller.directory().routers) == ["h:9"]
    assert controller.directory_version == version + 1


def test_nobody_waits_for_a_lock_and_sqlite_is_left_alone_after_a_failure(tmp_path: Path) -> None:
    clock = Clock()
    controller, store = _controller(tmp_path / "state.sqlite", clock)

    with faults.locked(store):
        for _ in range(100):
            with pytest.raises(UnavailableError, match=r"locked \(SQLITE_BUSY\)") as caught:
                controller.take_assignments(_report(1), now=0.0)
        tried = store.file.failures
        clock.now += 1.0
        with pytest.raises(UnavailableError):
            controller.take_assignments(_report(1), now=0.0)
    ((busy_ms,),) = store.file.rows("PRAGMA busy_timeout")

    assert (tried, store.file.failures) == (1, 2)
    assert busy_ms <= 20  # the event loop stands still for it
    assert caught.value.retry_after_s > 0


def test_the_end_of_a_fault_is_found_and_said_without_anything_to_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    controller, store = _controller(tmp_path / "state.sqlite", clock)
    with faults.locked(store):
        with pytest.raises(UnavailableError):
            controller.take_assignments(_report(1), now=0.0)
        clock.now += 1.0
        store.file.check()
        during = store.file.problem
    clock.now += 1.0
    store.file.check()

    assert "SQLITE_BUSY" in during
    assert store.file.problem == ""
    assert [r.levelno for r in caplog.records] == [logging.ERROR, logging.WARNING], "each once"
    assert store.meta("probe") is None


def test_room_for_a_byte_is_no_room(tmp_path: Path) -> None:
    clock = Clock()
    _, store = _controller(tmp_path / "state.sqlite", clock)
    with faults.full(store):
        with pytest.raises(UnavailableError):
            store.file.write("INSERT INTO meta VALUES ('large', zeroblob(100000))")
        clock.now += 1.0
        store.set_meta("epoch", "1")
        store.file.check()
        during = store.file.problem
    clock.now += 1.0
    store.file.check()

    assert "SQLITE_FULL" in during
    assert store.file.problem == ""


def test_a_file_that_was_taken_away_is_missed(tmp_path: Path) -> None:
    _, store = _controller(tmp_path / "state.sqlite", Clock())
    store.file.check()
    before = store.file.problem

    (tmp_path / "state.sqlite").rename(tmp_path / "elsewhere.sqlite")
    store.file.check()

    assert before == ""
    assert "removed or replaced" in store.file.problem


def test_a_bug_in_a_statement_is_no_full_disk(tmp_path: Path) -> None:
    _, store = _controller(tmp_path / "state.sqlite", Clock())

    with pytest.raises(sqlite3.IntegrityError):
        store.file.write("INSERT INTO meta VALUES ('epoch', NULL)")
    store.set_meta("epoch", "7")

    assert (store.file.problem, store.file.failures) == ("", 0)


def test_a_controller_starts_on_a_locked_file_and_keeps_its_port_later(tmp_path: Path) -> None:
    async def start() -> tuple[str, str | None, str | None]:
        server = ControllerServer(tmp_path / "state.sqlite", host="127.0.0.1", rpc=LOCAL)
        with faults.locked(server._store):
            await server.start()
            during = server._store.meta("port")
        async with asyncio.timeout(10.0):
            while server._store.meta("port") is None:  # noqa: ASYNC110 (SQLite has no event)
                await asyncio.sleep(0.02)
        found = server.address, during, server._store.meta("port")
        await server.stop()
        return found

    address, during, kept = loop.run(start())

    assert during is None
    assert address == f"127.0.0.1:{kept}"
