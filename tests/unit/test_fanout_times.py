"""When a fan out asks whom, to the instant: retries, second askings and errors. On our clock."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.config import RouterConfig
from expertmesh.dispatch import Part
from expertmesh.errors import (
    DeadlineError,
    InvalidRequestError,
    MeshError,
    OverloadedError,
    UnavailableError,
)
from expertmesh.rpc.deadline import Deadline
from router_service.asking import Ask, drop, failed
from tests.fakes import ALL, EPOCH, Bench, FakeServer, routed_batch
from tests.virtual_time import run_in_virtual_time

HALVES = ({0, 1, 2}, {3, 4, 5})
HANG_S = 60.0
CONFIG = RouterConfig(hedge_after_s=0.2, retry_pause_s=0.01, hedge_burst=0.0, hedge_share=0.0)
GENEROUS = RouterConfig(hedge_after_s=0.2, hedge_burst=100.0)


async def took(bench: Bench, timeout_s: float = 5.0) -> float:
    """The seconds that a batch takes, whether it is answered or not."""
    started = time.monotonic()
    with suppress(MeshError):
        await bench.run(timeout_s=timeout_s)
    return time.monotonic() - started


def answering(after_s: float, held: set[int] = ALL, patience_s: float = 0.2) -> FakeServer:
    return FakeServer(held, lambda call: after_s, patience_s)


class Refusing(FakeServer):
    """Says no before anything is sent."""

    def ask(self, request: ExecuteRequest, deadline: Deadline) -> asyncio.Future[ExecuteResponse]:
        self.calls += 1
        raise UnavailableError("no connection")


class FailingLate(FakeServer):
    """Is silent for half a second, and fails then."""

    async def execute(self, request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
        self.calls += 1
        await asyncio.sleep(0.5)
        raise UnavailableError("at last")


def test_a_server_is_asked_with_the_placements_epoch_until_the_requests_deadline() -> None:
    async def scenario() -> list[tuple[int, float]]:
        bench = Bench(CONFIG, a=answering(0.0))
        await bench.run(timeout_s=5.0)
        asked = bench.pool.servers["a"].asked
        return [(request.epoch, round(deadline.at, 6)) for request, deadline in asked]

    assert run_in_virtual_time(scenario()) == [(EPOCH, 5.0)]


def test_a_batch_that_is_answered_in_time_makes_no_task_of_its_own() -> None:
    async def scenario() -> tuple[int, int]:
        bench = Bench(CONFIG, a=answering(0.01, HALVES[0]), b=answering(0.02, HALVES[1]))
        loop, made = asyncio.get_running_loop(), []

        def noted(loop: Any, coroutine: Any, **context: Any) -> asyncio.Task[Any]:
            made.append(coroutine)
            return asyncio.Task(coroutine, loop=loop, **context)

        loop.set_task_factory(noted)
        await bench.run()
        return len(made), len(bench.fanout._sleeping)

    assert run_in_virtual_time(scenario()) == (2, 0), "the two fake answers"


def test_batches_of_the_same_rows_are_spread_over_replicas() -> None:
    async def scenario() -> list[int]:
        bench = Bench(CONFIG, a=answering(0.0), b=answering(0.0))
        for _ in range(40):
            await bench.run(rows=1)
        return [server.calls for server in bench.pool.servers.values()]

    assert min(run_in_virtual_time(scenario())) >= 10


def test_what_fails_is_asked_of_its_replica_while_others_still_compute() -> None:
    async def scenario() -> float:
        bench = Bench(
            CONFIG,
            a=Refusing(HALVES[0], lambda call: 0.0), b=answering(1.0, HALVES[0], 9.0),
            c=answering(1.0, HALVES[1], 9.0),
        )  # fmt: skip
        seconds = await took(bench)
        assert bench.pool.servers["a"].calls == 1, "the fault fired"
        return seconds

    assert run_in_virtual_time(scenario()) == pytest.approx(1.0)


def test_a_server_that_has_left_the_directory_is_replaced_at_once() -> None:
    async def scenario() -> tuple[float, int]:
        bench = Bench(CONFIG, a=answering(0.0), b=answering(0.0))
        del bench.pool.servers["a"]  # and the placement still names it
        started = time.monotonic()
        results = [await bench.run(seed=seed) for seed in range(20)]
        again = [result.retried_T for result in results if result.retried_T is not None]
        return time.monotonic() - started, len(again)

    seconds, again = run_in_virtual_time(scenario())

    assert seconds == pytest.approx(0.0, abs=1e-6)
    assert again >= 5, "it would have been asked"


def test_who_has_no_replica_is_asked_again_after_a_pause_each_time() -> None:
    async def scenario() -> tuple[float, int]:
        outcomes = [UnavailableError("restarting")] * 3
        server = FakeServer(ALL, lambda call: outcomes.pop() if outcomes else 0.0)
        return await took(Bench(CONFIG, a=server)), server.calls

    seconds, calls = run_in_virtual_time(scenario())

    assert seconds == pytest.approx(3 * CONFIG.retry_pause_s)
    assert calls == 4


def test_without_a_server_the_error_comes_a_little_before_the_deadline() -> None:
    async def scenario() -> tuple[float, float | None, int]:
        bench = Bench(CONFIG, c=answering(0.0, HALVES[1]))
        with pytest.raises(UnavailableError, match="is one starting") as refused:
            await bench.run(timeout_s=3.0)
        return time.monotonic(), refused.value.retry_after_s, bench.pool.looks

    at, retry_after_s, looks = run_in_virtual_time(scenario())

    assert at == pytest.approx(2.98)
    assert retry_after_s == 1.0
    assert looks == 7, "twice a second"


def test_an_overloaded_server_is_left_alone_as_long_as_it_says_and_time_allows() -> None:
    async def scenario(retry_after_s: float) -> tuple[float, int]:
        outcomes = [OverloadedError("full", retry_after_s=retry_after_s)]
        server = FakeServer(ALL, lambda call: outcomes.pop() if outcomes else 0.0)
        return await took(Bench(CONFIG, a=server), timeout_s=0.3), server.calls

    assert run_in_virtual_time(scenario(0.1)) == (pytest.approx(0.1 + CONFIG.retry_pause_s), 2)
    assert run_in_virtual_time(scenario(60.0)) == (pytest.approx(0.3), 1)


def test_where_nobody_answers_the_error_comes_at_the_deadline() -> None:
    async def scenario() -> tuple[float, int]:
        bench = Bench(CONFIG, a=answering(HANG_S), b=answering(HANG_S))
        with pytest.raises(DeadlineError, match="did not answer before the deadline"):
            await bench.run(timeout_s=1.7)
        return time.monotonic(), len(bench.fanout._sleeping)

    assert run_in_virtual_time(scenario()) == (pytest.approx(1.7), 0)


def test_each_server_that_is_silent_for_the_same_pairs_is_waited_for_half_as_long() -> None:
    async def scenario() -> float:
        bench = Bench(
            CONFIG, a=answering(HANG_S), b=answering(HANG_S), c=answering(HANG_S), d=answering(0.0)
        )
        bench.pool.servers["d"].standing.suspect(time.monotonic(), 12, 0.2)  # asked last of all
        return await took(bench)

    # Three parts of the batch go to a, b or c at first; who is left of these is asked next.
    assert run_in_virtual_time(scenario()) == pytest.approx(0.2 + 0.05)


def test_only_who_is_overdue_is_asked_around() -> None:
    async def scenario() -> tuple[float, list[int], int]:
        bench = Bench(
            GENEROUS,
            a=answering(HANG_S, HALVES[0]), b=answering(0.0, HALVES[0]),
            c=answering(0.5, HALVES[1], 1.0), d=answering(0.5, HALVES[1], 1.0),
        )  # fmt: skip
        bench.pool.servers["b"].standing.suspect(time.monotonic(), 12, 0.2)  # asked after a
        seconds = await took(bench)
        return seconds, [bench.pool.servers[name].calls for name in "ab"], bench.fanout.hedges

    assert run_in_virtual_time(scenario()) == (pytest.approx(0.5), [1, 1], 1)


def test_a_slow_server_is_not_its_own_replica() -> None:
    async def scenario() -> tuple[list[int], int]:
        bench = Bench(GENEROUS, a=answering(0.5), b=answering(0.5))
        for server in bench.pool.servers.values():  # they answer others all the time
            server.standing.answered(HANG_S, HANG_S, 4096, HANG_S)
        for seed in range(20):
            await bench.run(seed=seed)
        return [server.calls for server in bench.pool.servers.values()], bench.fanout.hedges

    calls, hedges = run_in_virtual_time(scenario())

    assert hedges >= 20
    assert calls == [hedges, hedges], "of each part one asking and one second asking"


def test_a_second_asking_that_fails_leaves_the_first() -> None:
    async def scenario(after_s: float) -> tuple[float, int]:
        refusing = FakeServer(ALL, lambda call: InvalidRequestError("it says so"))
        bench = Bench(GENEROUS, a=answering(after_s), b=refusing)
        bench.pool.servers["b"].standing.suspect(time.monotonic(), 12, 0.2)
        return await took(bench, timeout_s=2.0), bench.pool.servers["b"].calls

    assert run_in_virtual_time(scenario(0.7)) == (pytest.approx(0.7), 1)
    assert run_in_virtual_time(scenario(HANG_S)) == (pytest.approx(2.0), 1)


def test_who_fails_while_its_replica_computes_was_not_silent() -> None:
    async def scenario() -> tuple[float, bool, int]:
        bench = Bench(GENEROUS, a=FailingLate(ALL, lambda call: 0.0, 0.2), b=answering(0.5))
        bench.pool.servers["b"].standing.suspect(time.monotonic(), 12, 0.2)
        seconds = await took(bench)
        return seconds, bench.pool.servers["a"].standing.suspected, bench.pool.servers["a"].calls

    assert run_in_virtual_time(scenario()) == (pytest.approx(0.7), False, 1)


@pytest.mark.parametrize("has_failed", [True, False], ids=["failed", "silent"])
def test_only_a_server_that_has_said_nothing_loses_to_its_replica(has_failed: bool) -> None:
    async def scenario() -> set[str]:
        bench = Bench(CONFIG, a=answering(0.0), b=answering(0.0))
        server = bench.pool.servers["a"]
        answer = failed(UnavailableError("at last"))
        if not has_failed:
            answer = asyncio.get_running_loop().create_future()
        ids = routed_batch(12, 2).expert_ids
        ask = Ask(
            Part(0, None, ids), "a", server, torch.Size((12, 4)),  # type: ignore[arg-type]
            answer, asked_at=-1.0, patience_s=0.2, look_at=-0.8,
        )  # fmt: skip
        bench.fanout._note_lost(ask)
        drop(answer)
        return {name for name, each in bench.pool.servers.items() if each.standing.suspected}

    assert run_in_virtual_time(scenario()) == (set() if has_failed else {"a"})


def test_a_part_that_was_waited_for_earns_a_share_of_a_second_asking() -> None:
    async def scenario() -> list[int]:
        config = RouterConfig(hedge_after_s=0.2, hedge_burst=1.0, hedge_share=0.25)
        bench = Bench(config, a=answering(0.5), b=answering(0.5))
        for server in bench.pool.servers.values():
            server.standing.answered(HANG_S, HANG_S, 4096, HANG_S)
        hedges = []
        for _ in range(9):
            await bench.run(rows=1, seed=1)
            hedges.append(bench.fanout.hedges)
        return hedges

    assert run_in_virtual_time(scenario()) == [1] * 5 + [2] * 4
