"""Fan out against servers that hang: they take requests, and answer none of them. On our clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.config import RouterConfig
from expertmesh.errors import DeadlineError
from expertmesh.rpc.deadline import Deadline
from tests.fakes import ALL, Behaviour, Bench, FakeServer
from tests.virtual_time import run_in_virtual_time

HANG_S = 60.0
PATIENCE_S = 0.2
NO_BUDGET = RouterConfig(
    hedge_after_s=PATIENCE_S, hedge_burst=0.0, hedge_share=0.0, retry_pause_s=0.001
)
AT_ONCE = pytest.approx(0.0, abs=1e-6)
ONE_PATIENCE = pytest.approx(PATIENCE_S)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 (what it looks at has no event)
            await asyncio.sleep(0.002)


class Mesh(Bench):
    """Servers that hold everything, each of which hangs while its name is in `hung`."""

    def __init__(self, names: str, hung: str = "") -> None:
        self.hung = set(hung)
        servers = {name: FakeServer(ALL, self._behaviour(name), PATIENCE_S) for name in names}
        super().__init__(NO_BUDGET, **servers)
        self.servers = self.pool.servers

    def _behaviour(self, name: str) -> Behaviour:
        return lambda call: HANG_S if name in self.hung else 0.0

    async def takes(self, seed: int = 1, rows: int = 12, timeout_s: float = 5.0) -> float:
        """The seconds of one batch, whose answer is right."""
        started = time.monotonic()
        await self.run(rows, seed, timeout_s)
        return time.monotonic() - started

    async def take(self, count: int) -> float:
        """The seconds of the longest of so many, one after the other."""
        return max([await self.takes(seed) for seed in range(count)])

    def probe_due(self, name: str) -> bool:
        return self.servers[name].standing.probe_due(time.monotonic(), 12)

    def suspected(self) -> set[str]:
        return {name for name, server in self.servers.items() if server.standing.suspected}


def test_a_server_that_hangs_stalls_nobody_for_long_though_the_budget_is_spent() -> None:
    async def scenario() -> tuple[list[float], Mesh]:
        mesh = Mesh("ab", hung="a")
        return await asyncio.gather(*(mesh.takes(seed) for seed in range(12))), mesh

    took, mesh = run_in_virtual_time(scenario())

    assert max(took) == ONE_PATIENCE
    assert mesh.suspected() == {"a"}
    assert mesh.servers["a"].calls > 1, "it held many of them"


def test_a_server_that_hangs_from_its_first_request_on_is_left_out_after_one_patience() -> None:
    async def scenario() -> tuple[float, float]:
        mesh = Mesh("ab", hung="a")
        return await mesh.take(3), await mesh.take(20)

    first, later = run_in_virtual_time(scenario())

    assert first == ONE_PATIENCE
    assert later == AT_ONCE, "nobody waits for it any more"


def test_a_suspect_gets_one_probe_and_no_other_part() -> None:
    async def scenario() -> tuple[list[float], float]:
        mesh = Mesh("ab", hung="a")
        await asyncio.gather(*(mesh.takes(seed) for seed in range(8)))
        start, probed, longest = time.monotonic(), [], 0.0
        for seed in range(500):
            before = mesh.servers["a"].calls
            longest = max(longest, await mesh.takes(seed))
            if mesh.servers["a"].calls > before:
                probed.append(round(time.monotonic() - start, 2))
            await asyncio.sleep(0.01)
        return probed, longest

    probed, longest = run_in_virtual_time(scenario())

    assert probed == pytest.approx([0.05, 2.05, 4.05], abs=0.02)  # given up after two seconds
    assert longest == AT_ONCE


def test_a_server_that_recovers_is_back_with_its_next_probe() -> None:
    async def scenario() -> tuple[Mesh, int]:
        mesh = Mesh("ab", hung="a")
        await mesh.take(5)
        mesh.hung.clear()
        async with asyncio.timeout(5.0):
            while mesh.suspected():
                await mesh.takes()
                await asyncio.sleep(0.01)
        before = mesh.servers["a"].calls
        await mesh.take(20)
        return mesh, mesh.servers["a"].calls - before

    mesh, calls = run_in_virtual_time(scenario())

    assert mesh.suspected() == set()
    assert calls > 5, "it gets its share again"


def test_a_few_rows_are_copied_to_a_suspect_and_counted_as_sent_again() -> None:
    async def scenario() -> tuple[int, list[int]]:
        mesh = Mesh("ab", hung="a")
        await mesh.take(5)
        mesh.hung.clear()
        await _until(lambda: mesh.probe_due("a"))
        before = mesh.servers["a"].calls
        again = (await mesh.run(rows=40, seed=1)).retried_T
        return mesh.servers["a"].calls - before, [] if again is None else again.tolist()

    # Some rows are enough: a server that hangs keeps what it is sent.
    assert run_in_virtual_time(scenario()) == (1, [3] * 16 + [0] * 24)


def test_two_of_three_that_hang_stall_nobody_for_long() -> None:
    async def scenario() -> tuple[list[float], set[str], float]:
        mesh = Mesh("abc", hung="ab")
        took = await asyncio.gather(*(mesh.takes(seed) for seed in range(12)))
        await mesh.take(5)
        return took, mesh.suspected(), await mesh.take(10)

    took, suspected, later = run_in_virtual_time(scenario())

    assert max(took) == ONE_PATIENCE
    assert suspected == {"a", "b"}
    assert later == AT_ONCE


def test_a_replica_that_hangs_as_well_is_given_up_for_a_third() -> None:
    async def scenario() -> tuple[float, set[str]]:
        mesh = Mesh("abc", hung="ab")
        mesh.servers["c"].standing.suspect(time.monotonic(), 12, PATIENCE_S)  # asked last of all
        took = await mesh.takes()
        return took, mesh.suspected()

    took, suspected = run_in_virtual_time(scenario())

    assert took == ONE_PATIENCE
    assert suspected >= {"a", "b"}


def test_where_all_replicas_hang_the_error_comes_in_time_and_nobody_is_suspected() -> None:
    async def scenario() -> set[str]:
        mesh = Mesh("ab", hung="ab")
        with pytest.raises(DeadlineError):
            await mesh.takes(timeout_s=6 * PATIENCE_S)
        return mesh.suspected()

    assert run_in_virtual_time(scenario()) == set()


def test_without_a_replica_a_server_that_takes_long_is_waited_for() -> None:
    async def scenario() -> tuple[int, int, set[str]]:
        mesh = Mesh("a")
        mesh.servers["a"].behave = lambda call: 6 * PATIENCE_S
        await mesh.takes()
        return mesh.servers["a"].calls, mesh.fanout.hedges, mesh.suspected()

    assert run_in_virtual_time(scenario()) == (1, 0, set())


def test_where_every_server_is_slow_and_answers_only_the_budget_is_spent() -> None:
    async def scenario() -> tuple[int, set[str]]:
        mesh = Mesh("ab")
        for server in mesh.servers.values():
            server.behave = lambda call: 4 * PATIENCE_S
        async with asyncio.TaskGroup() as group:
            for seed in range(100):
                group.create_task(mesh.takes(seed))
                await asyncio.sleep(0.005)
        return mesh.fanout.hedges, mesh.suspected()

    hedges, suspected = run_in_virtual_time(scenario())

    # Until the first answer nobody can tell slow from silent: a test a patience and server.
    assert hedges <= 2 * 4
    assert suspected == set()


def test_a_large_part_that_may_take_long_does_not_wait_once_its_server_is_suspected() -> None:
    async def scenario() -> float:
        mesh = Mesh("ab", hung="a")
        mesh.servers["a"].row_patience_s = 1.0  # a large part may take a minute
        large = asyncio.ensure_future(mesh.takes(1, rows=60, timeout_s=50.0))
        await asyncio.sleep(0)
        mesh.servers["a"].row_patience_s = 0.0
        small = asyncio.ensure_future(mesh.takes(2, rows=8))
        await small
        return await large

    assert run_in_virtual_time(scenario()) == ONE_PATIENCE


class SmallOnly(FakeServer):
    """Loses what is large, as a path does that drops long packets."""

    async def execute(self, request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
        if request.hidden_states.shape[0] > 8:
            await asyncio.sleep(HANG_S)
        return await super().execute(request, deadline)


def test_a_server_that_answers_only_small_requests_keeps_those_and_loses_the_others() -> None:
    async def scenario() -> tuple[float, float]:
        mesh = Mesh("ab")
        mesh.servers["a"] = SmallOnly(ALL, lambda call: 0.0, PATIENCE_S)
        standing, longest = mesh.servers["a"].standing, 0.0

        async def small() -> None:
            while True:
                await mesh.takes(rows=4)
                await asyncio.sleep(0.005)

        going = asyncio.ensure_future(small())
        async with asyncio.timeout(10.0):
            while not standing.is_suspect(64):
                longest = max(longest, await mesh.takes(rows=64))
                await asyncio.sleep(0.005)
        assert not standing.is_suspect(4)
        before = mesh.servers["a"].calls
        await _until(lambda: mesh.servers["a"].calls > before + 5)
        large = [len(r.hidden_states) for r, _ in mesh.servers["a"].asked].count(64)
        later = max([await mesh.takes(seed, rows=64) for seed in range(10)])
        assert [len(r.hidden_states) for r, _ in mesh.servers["a"].asked].count(64) <= large + 1
        going.cancel()
        return longest, later

    assert run_in_virtual_time(scenario()) == (ONE_PATIENCE, AT_ONCE)


def test_what_a_lost_server_was_asked_for_goes_to_its_replica() -> None:
    async def scenario() -> list[float]:
        mesh = Mesh("ab", hung="a")
        for server in mesh.servers.values():
            server.patience = HANG_S
        runs = [asyncio.ensure_future(mesh.takes(seed)) for seed in range(6)]
        await _until(lambda: mesh.servers["a"].in_flight > 0)
        mesh.pool.lose("a")
        return await asyncio.gather(*runs)

    assert max(run_in_virtual_time(scenario())) == pytest.approx(0.002), "when it was lost"
