"""Which servers a router may ask for which experts, without a network."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest

from expertmesh.config import RouterConfig
from expertmesh.placement import SlotMap
from expertmesh.v1 import router_pb2
from router_service import pool as pool_module
from router_service.link import ServerLink
from router_service.pool import ExpertPool

LAYER = 3
T = TypeVar("T")


class StillLink(ServerLink):
    """A link that never connects: the test says what it is."""

    connected: bool = True  # type: ignore[assignment]
    in_flight: int = 0  # type: ignore[assignment]

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self.of = of
        self.ended = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True


@pytest.fixture(autouse=True)
def links_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "ServerLink", StillLink)


def _status(name: str, state: str = "ready", endpoint: str = "h:1") -> router_pb2.ServerStatus:
    return router_pb2.ServerStatus(server_id=name, state=state, endpoint=endpoint)


def _slots(*held: str, epoch: int = 1, rates: dict[str, float] | None = None) -> SlotMap:
    """Server "a" holds the experts that have a 1 in the first word, and so on."""
    holds = np.array([[digit == "1" for digit in word] for word in held])
    return SlotMap(epoch, tuple("abcdef"[: len(held)]), {LAYER: holds}, rates or {})


def _in_a_pool(names: str, scenario: Callable[[ExpertPool], Awaitable[T]]) -> T:
    """What a scenario returns, with a pool of servers that are ready."""

    async def run() -> T:
        pool = ExpertPool("digest", RouterConfig(hedge_after_s=0.25))
        pool.update([_status(name) for name in names])
        await asyncio.sleep(0)  # the links have begun
        try:
            return await scenario(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def _link(pool: ExpertPool, name: str) -> StillLink:
    link = pool.link(name)
    assert isinstance(link, StillLink)
    return link


def _holds(
    pool: ExpertPool, slots: SlotMap, avoid: frozenset[str] = frozenset(), rows: int = 1
) -> list[list[int]]:
    """[S, E] of who can be asked."""
    return pool.holders(slots, LAYER, avoid, rows).holds_ES.T.astype(int).tolist()


def test_a_link_is_kept_while_its_server_is_announced_and_ended_when_it_is_gone() -> None:
    async def scenario(pool: ExpertPool) -> tuple[Any, ...]:
        a, b = _link(pool, "a"), _link(pool, "b")
        pool.update([_status("c"), _status("b", "draining")])
        ended = [a.ended, b.ended]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        names = [name for name, _ in pool.links()]
        kept = pool.link("b") is b and b.announced.state == "draining"
        return ended, [a.ended, b.ended], pool.link("a"), kept, names, b.of[1:3]

    at_once, ended, gone, kept, names, of = _in_a_pool("ba", scenario)

    assert at_once == [False, False]
    assert ended == [True, False]
    assert gone is None
    assert kept
    assert names == ["b", "c"]
    assert of == ("digest", RouterConfig(hedge_after_s=0.25))


def test_a_server_without_an_endpoint_gets_no_link_until_it_has_one() -> None:
    async def scenario(pool: ExpertPool) -> list[bool]:
        pool.update([_status("a", "loading", endpoint=""), _status("b")])
        linked = [pool.link("a") is not None, pool.link("b") is not None]
        pool.update([_status("a"), _status("b")])
        return [*linked, pool.link("a") is not None]

    assert _in_a_pool("", scenario) == [False, True, True]


def test_closing_ends_every_link() -> None:
    async def scenario(pool: ExpertPool) -> list[bool]:
        links = [_link(pool, name) for name in "ab"]
        await pool.close()
        return [link.ended for link in links]

    assert _in_a_pool("ab", scenario) == [True, True]


@pytest.mark.parametrize(
    ("state", "connected", "can"),
    [
        ("ready", True, True),
        ("lost", True, True),
        ("ready", False, False),
        ("draining", True, False),
        ("loading", True, False),
    ],
)
def test_who_is_ready_or_lost_can_be_asked_if_connected(
    state: str, connected: bool, can: bool
) -> None:
    async def scenario(pool: ExpertPool) -> tuple[bool, bool, list[list[int]]]:
        pool.update([_status("a", state)])
        _link(pool, "a").connected = connected
        return pool.can_be_asked("a"), pool.can_be_asked("b"), _holds(pool, _slots("11", "11"))

    asked = [[int(can)] * 2, [0, 0]]  # nobody announced "b"
    assert _in_a_pool("a", scenario) == (can, False, asked)


def test_servers_to_avoid_count_as_gone_whatever_only_they_hold() -> None:
    async def scenario(pool: ExpertPool) -> list[list[int]]:
        return _holds(pool, _slots("110", "011"), avoid=frozenset("a"))

    assert _in_a_pool("ab", scenario) == [[0, 0, 0], [0, 1, 1]]


def test_a_suspect_is_asked_only_for_what_nobody_else_holds_and_for_as_few_rows_as_it_answers() -> (
    None
):
    async def scenario(pool: ExpertPool) -> tuple[list[list[int]], ...]:
        slots, link, now = _slots("110", "011"), _link(pool, "a"), time.monotonic()
        before = _holds(pool, slots, rows=64)
        link.answered(now, 2, 60.0)  # it answers what is small
        link.suspect(64, 60.0)
        return before, _holds(pool, slots, rows=64), _holds(pool, slots, rows=2)

    before, large, small = _in_a_pool("ab", scenario)

    assert before == [[1, 1, 0], [0, 1, 1]]
    assert large == [[1, 0, 0], [0, 1, 1]]
    assert small == before


def test_without_a_number_it_is_about_one_row_and_without_servers_about_nobody() -> None:
    async def scenario(pool: ExpertPool) -> tuple[list[list[int]], list[list[int]]]:
        link = _link(pool, "a")
        link.answered(time.monotonic(), 1, 60.0)
        link.suspect(2, 60.0)
        nobody = SlotMap(2, (), {LAYER: np.zeros((0, 2), np.bool_)})
        holds = pool.holders(_slots("11", "01"), LAYER).holds_ES.T.astype(int).tolist()
        return holds, pool.holders(nobody, LAYER).count_E.tolist()

    assert _in_a_pool("ab", scenario) == ([[1, 1], [0, 1]], [0, 0])


def test_a_lost_server_is_asked_only_for_what_nobody_else_holds() -> None:
    async def scenario(pool: ExpertPool) -> tuple[list[list[int]], list[frozenset[str]]]:
        nobody = pool.left_out(1)
        pool.update([_status("a", "lost"), _status("b")])
        return _holds(pool, _slots("110", "011")), [nobody, pool.left_out(1)]

    assert _in_a_pool("ab", scenario) == ([[1, 0, 0], [0, 1, 1]], [frozenset(), frozenset("a")])


def test_who_waits_is_told_of_servers_newly_lost_and_of_no_others() -> None:
    async def scenario(pool: ExpertPool) -> list[int]:
        told: list[int] = []
        pool.on_left_out = lambda: told.append(1)
        seen = []
        for states in (("ready", "ready"), ("lost", "ready"), ("lost", "ready"), ("lost", "lost")):
            pool.update([_status(n, state) for n, state in zip("ab", states, strict=True)])
            seen.append(len(told))
        return seen

    assert _in_a_pool("ab", scenario) == [0, 1, 1, 2]


def test_new_rows_go_by_planned_speed_and_less_to_where_requests_wait() -> None:
    async def scenario(pool: ExpertPool) -> list[float]:
        _link(pool, "b").in_flight = 4
        slots = _slots("1", "1", "1", rates={"a": 3.0, "b": 6.0, "c": 5.0})
        rates: list[float] = pool.holders(slots, LAYER).rate_S.tolist()
        return rates

    assert _in_a_pool("ab", scenario) == [3.0, pytest.approx(2.0), pytest.approx(0.0, abs=1e-6)]


def test_a_server_without_a_planned_speed_counts_as_1() -> None:
    async def scenario(pool: ExpertPool) -> list[float]:
        rates: list[float] = pool.holders(_slots("1", "1", rates={"b": 4.0}), LAYER).rate_S.tolist()
        return rates

    assert _in_a_pool("ab", scenario) == [1.0, 4.0]


def test_who_can_be_asked_is_worked_out_once_until_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(pool: ExpertPool) -> list[bool]:
        slots, clock = _slots("11", "01"), [0.0]
        same = []
        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: clock[0])
            first = pool.holders(slots, LAYER)
            same.append(pool.holders(slots, LAYER) is first)
            same.append(pool.holders(slots, LAYER, frozenset("b")) is first)
            clock[0] = 0.05
            same.append(pool.holders(slots, LAYER) is first)
            clock[0] = 0.051
            second = pool.holders(slots, LAYER)
            same.append(second is first)
            clock[0] = 0.1
            same.append(pool.holders(slots, LAYER) is second)
            same.append(pool.holders(_slots("11", "01", epoch=2), LAYER) is second)
            third = pool.holders(slots, LAYER)
            pool.placed()
            same.append(pool.holders(slots, LAYER) is third)
        return same

    assert _in_a_pool("ab", scenario) == [True, False, True, False, True, False, False]


def test_everybody_who_waits_for_a_change_hears_of_it_and_then_waits_for_the_next() -> None:
    async def scenario(pool: ExpertPool) -> list[bool]:
        first = [asyncio.ensure_future(pool.wait_change(30.0)) for _ in range(2)]
        await asyncio.sleep(0)
        before = [wait.done() for wait in first]
        pool.placed()
        await asyncio.wait_for(asyncio.gather(*first), 5.0)
        later = asyncio.ensure_future(pool.wait_change(30.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting = not later.done()
        _link(pool, "a").suspect(1, 0.1)  # a link that has news says so
        await asyncio.wait_for(later, 5.0)
        return [*before, waiting]

    assert _in_a_pool("a", scenario) == [False, False, True]


def test_a_wait_for_a_change_ends_after_its_time() -> None:
    async def scenario(pool: ExpertPool) -> None:
        await asyncio.wait_for(pool.wait_change(0.001), 5.0)
        pool.placed()  # and who has given up is told nothing

    _in_a_pool("a", scenario)


def test_the_directory_is_listed_with_what_the_router_knows_besides() -> None:
    async def scenario(pool: ExpertPool) -> list[router_pb2.ServerStatus]:
        a, b = _link(pool, "a"), _link(pool, "b")
        a.announced.error = "says the server"
        a.error = b.error = "says the link"
        a.connected, a.in_flight = False, 3
        b.answered(0.0, 7, 1.0)
        b.suspect(1, 0.1)
        return pool.statuses()

    a, b = _in_a_pool("ba", scenario)

    assert (a.server_id, a.endpoint, a.error) == ("a", "h:1", "says the server")
    assert (a.connected, a.requests_in_flight, a.answered_rows) == (False, 3, 0)
    assert (b.server_id, b.error, b.connected, b.answered_rows) == ("b", "says the link", True, 7)
    assert (a.suspected, b.suspected, a.transport) == (False, True, "grpc")


def test_a_link_that_fails_is_told_of_by_the_name_of_its_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(link: StillLink) -> None:
        raise OSError("no route")

    monkeypatch.setattr(StillLink, "run", fail)

    async def scenario(pool: ExpertPool) -> tuple[str, dict[str, int]]:
        await asyncio.sleep(0)  # each link fails for the first time
        return pool.tasks.problem, pool.tasks.failures

    problem, failures = _in_a_pool("ab", scenario)

    assert [name in problem for name in ("server link a", "server link b")] == [True, True]
    assert failures == {"server link": 2}
