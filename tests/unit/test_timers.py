"""Deadlines behind one timer of the loop: in their order, never sooner, and gone when cancelled."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import uvloop

from expertmesh.rpc.timers import Timers


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Awaitable[object]], object]:
    return request.param  # type: ignore[no-any-return]


def test_each_runs_once_in_its_order_and_never_sooner(run) -> None:
    async def check() -> None:
        loop, timers = asyncio.get_running_loop(), Timers()
        ran: list[tuple[float, float]] = []
        last = loop.create_future()

        def note(wanted: float) -> None:
            ran.append((wanted, loop.time() - started))
            if len(ran) == 4:
                last.set_result(None)

        started = loop.time()
        for seconds in (0.03, 0.01, 0.02, 0.0):
            timers.after(seconds, partial(note, seconds))
        await last

        assert [wanted for wanted, _ in ran] == [0.0, 0.01, 0.02, 0.03]
        assert all(at >= wanted - 1e-9 for wanted, at in ran)  # a difference of sums
        assert len(timers) == 0

    run(check())


def test_a_sooner_one_is_not_kept_waiting_by_a_later_one_set_before(run) -> None:
    async def check() -> None:
        timers, soon = Timers(), asyncio.get_running_loop().create_future()
        late = timers.after(3600.0, soon.cancel)
        timers.after(0.001, partial(soon.set_result, None))

        await soon

        assert late.pending
        timers.close()

    run(check())


def test_what_is_cancelled_does_not_run_and_lets_go_of_what_it_had(run) -> None:
    class Rows:
        pass

    async def check() -> None:
        timers, later = Timers(), asyncio.get_running_loop().create_future()
        rows = Rows()
        gone = weakref.ref(rows)
        timer = timers.after(0.0, partial(later.set_exception, AssertionError(rows)))
        timers.after(0.005, partial(later.set_result, None))

        timer.cancel()
        del rows
        assert gone() is None
        await later
        timer.cancel()  # once more does nothing

        assert not timer.pending

    run(check())


def test_cancelled_ones_are_not_kept_until_their_time(run) -> None:
    async def check() -> None:
        timers = Timers()
        kept = timers.after(3600.0, lambda: None)
        for _ in range(20_000):
            timers.after(3600.0, lambda: None).cancel()

        assert kept.pending
        assert len(timers) < 5_000
        timers.close()

    run(check())


def test_after_close_nothing_runs(run) -> None:
    async def check() -> None:
        timers, later = Timers(), asyncio.get_running_loop().create_future()
        timers.after(0.0, partial(later.set_exception, AssertionError()))
        timers.close()
        asyncio.get_running_loop().call_later(0.01, later.set_result, None)

        await later

        assert len(timers) == 0

    run(check())


def test_one_that_sets_another_from_its_callback_is_followed_by_it(run) -> None:
    async def check() -> None:
        timers, second = Timers(), asyncio.get_running_loop().create_future()
        timers.after(0.0, lambda: timers.after(0.0, partial(second.set_result, None)))

        await second

    run(check())
