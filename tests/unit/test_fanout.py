"""Fan out against servers that fail in every way: each pair counts exactly once."""

from __future__ import annotations

import random

import pytest
import torch

from expertmesh.config import RouterConfig
from expertmesh.dispatch import combine
from expertmesh.errors import (
    InternalError,
    InvalidRequestError,
    MeshError,
    OverloadedError,
    SlotNotHeldError,
    StaleEpochError,
    UnavailableError,
)
from expertmesh.rpc.deadline import Deadline
from router_service.fanout import FanOutResult
from router_service.routing import RoutedBatch
from router_service.snapshot import Snapshot
from tests.fakes import (
    EXPERTS,
    LAYER,
    Behaviour,
    Bench,
    FakeServer,
    right_answer,
    routed_batch,
)
from tests.virtual_time import run_in_virtual_time

CONFIG = RouterConfig(hedge_after_s=0.02, retry_pause_s=0.001)


async def _run(
    servers: dict[str, FakeServer], batch: RoutedBatch, timeout_s: float = 5.0
) -> FanOutResult:
    bench = Bench(CONFIG, **servers)
    snapshot = Snapshot(bench.pool.slots)
    return await bench.fanout.run(batch, LAYER, snapshot, Deadline.after(timeout_s))


def _always(outcome: MeshError | float) -> Behaviour:
    return lambda call: outcome


def _first(count: int, outcome: MeshError | float) -> Behaviour:
    return lambda call: outcome if call <= count else 0.0


HALVES = ({0, 1, 2}, {3, 4, 5})


@pytest.mark.parametrize(
    "error",
    [
        UnavailableError("gone"),
        OverloadedError("full", retry_after_s=0.001),
        StaleEpochError("old"),
        SlotNotHeldError("not here"),
        InternalError("bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_pairs_of_a_failed_server_are_computed_by_its_replica(error: MeshError) -> None:
    servers = {
        "a": FakeServer(HALVES[0], _always(error)),
        "b": FakeServer(HALVES[0], _always(0.0)),
        "c": FakeServer(HALVES[1], _always(0.0)),
    }
    batch = routed_batch(20, 0)

    result = run_in_virtual_time(_run(servers, batch))

    output = combine(batch.hidden, result.contributions)
    torch.testing.assert_close(output, right_answer(batch))
    assert servers["a"].calls >= 1, "the fault fired"
    assert result.retried_T is not None
    assert result.retried_T.sum() > 0


def test_a_server_without_a_replica_is_asked_again_until_it_answers() -> None:
    servers = {
        "a": FakeServer(HALVES[0], _first(4, UnavailableError("restarting"))),
        "c": FakeServer(HALVES[1], _always(0.0)),
    }
    batch = routed_batch(8, 1)

    result = run_in_virtual_time(_run(servers, batch))

    torch.testing.assert_close(combine(batch.hidden, result.contributions), right_answer(batch))
    assert servers["a"].calls == 5
    assert servers["c"].calls == 1


def test_a_silent_server_is_hedged_and_only_one_answer_counts() -> None:
    servers = {
        "a": FakeServer(HALVES[0], _always(1.0)),
        "b": FakeServer(HALVES[0], _always(0.0)),
        "c": FakeServer(HALVES[1], _always(0.0)),
    }
    batch = routed_batch(12, 2)

    result = run_in_virtual_time(_run(servers, batch))

    torch.testing.assert_close(combine(batch.hidden, result.contributions), right_answer(batch))
    assert servers["a"].standing.suspected


def test_hedges_are_counted_and_ordinary_askings_are_not() -> None:
    async def run(patience_s: float) -> int:
        servers = {
            name: FakeServer(half, _always(0.5), patience_s)
            for name, half in (("a", HALVES[0]), ("b", HALVES[0]), ("c", HALVES[1]))
        }
        bench = Bench(CONFIG, **servers)
        await bench.run()
        return bench.fanout.hedges

    assert run_in_virtual_time(run(patience_s=0.01)) > 0
    assert run_in_virtual_time(run(patience_s=60.0)) == 0


def test_without_a_server_the_error_names_expert_and_layer_before_the_deadline() -> None:
    servers = {"c": FakeServer(HALVES[1], _always(0.0))}

    with pytest.raises(UnavailableError, match=r"expert \d of layer 3"):
        run_in_virtual_time(_run(servers, routed_batch(4, 3), timeout_s=0.1))


def test_a_request_that_servers_call_invalid_is_not_tried_again() -> None:
    servers = {"a": FakeServer(set(range(EXPERTS)), _always(InvalidRequestError("wrong")))}

    with pytest.raises(InvalidRequestError):
        run_in_virtual_time(_run(servers, routed_batch(4, 4)))

    assert servers["a"].calls == 1


def test_a_bug_that_repeats_is_reported_and_not_tried_for_ever() -> None:
    servers = {"a": FakeServer(set(range(EXPERTS)), _always(InternalError("bug")))}

    with pytest.raises(InternalError):
        run_in_virtual_time(_run(servers, routed_batch(4, 5)))

    assert servers["a"].calls == 2


@pytest.mark.parametrize("seed", range(60))
def test_every_pair_contributes_exactly_once_whatever_fails(seed: int) -> None:
    chance = random.Random(seed)
    errors = [
        UnavailableError("x"),
        OverloadedError("x", retry_after_s=0.001),
        StaleEpochError("x"),
        SlotNotHeldError("x"),
    ]

    def behave(call: int) -> MeshError | float:
        draw = chance.random()
        if draw < 0.3 and call < 8:
            return chance.choice(errors)
        return 0.03 if draw < 0.4 else 0.0

    servers = {
        f"s{index}": FakeServer({e for e in range(EXPERTS) if chance.random() < 0.6}, behave)
        for index in range(4)
    }
    servers["all"] = FakeServer(set(range(EXPERTS)), behave)
    batch = routed_batch(chance.randint(1, 30), seed)

    result = run_in_virtual_time(_run(servers, batch))

    torch.testing.assert_close(combine(batch.hidden, result.contributions), right_answer(batch))


def test_parts_that_are_answered_in_time_pay_for_second_askings_of_slow_servers() -> None:
    """A burst of one and a tenth for each part: three of a batch with a second asking, three of one
    whose slow server is waited for, and twice three of batches that are answered at once."""
    servers = {
        "a": FakeServer(HALVES[0], lambda call: 0.05 if servers["a"].patience < 1 else 0.0),
        "b": FakeServer(HALVES[0], _always(0.0), patience_s=60.0),  # the replica of "a"
        "c": FakeServer(HALVES[1], _always(0.0), patience_s=60.0),
    }
    servers["a"].standing.answered(60.0, 60.0, 4096, 60.0)  # later than all that follows

    async def scenario() -> list[tuple[int, int]]:
        bench = Bench(RouterConfig(hedge_burst=1.0, hedge_share=0.1), **servers)
        seen = []
        for slow in (True, True, False, False, True):
            servers["a"].patience = 0.01 if slow else 60.0
            before = sum(server.calls for server in servers.values())
            await bench.run()
            seen.append(
                (bench.fanout.hedges, sum(server.calls for server in servers.values()) - before)
            )
        return seen

    assert run_in_virtual_time(scenario()) == [(1, 4), (1, 3), (1, 3), (1, 3), (2, 4)]
