"""Fan out against servers that fail in every way: each pair counts exactly once."""

from __future__ import annotations

import asyncio
import random

import numpy as np
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
from router_service.fanout import FanOut, FanOutResult, HedgeBudget
from router_service.routing import RoutedBatch
from router_service.snapshot import Snapshot
from tests.fakes import Behaviour, FakePool, FakeServer

LAYER, EXPERTS = 3, 6
CONFIG = RouterConfig(hedge_after_s=0.02, retry_pause_s=0.001)


def _batch(rows: int, seed: int) -> RoutedBatch:
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(EXPERTS)[:3] for _ in range(rows)]).astype(np.int32)
    weights = generator.random((rows, 3), np.float32)
    hidden = torch.from_numpy(generator.random((rows, 4), np.float32))
    return RoutedBatch(hidden, ids, weights, 3)


def _expected(batch: RoutedBatch) -> torch.Tensor:
    factor = ((batch.expert_ids + 1).astype(np.float32) * batch.weights).sum(1)
    return batch.hidden * torch.from_numpy(factor)[:, None]


async def _run(
    servers: dict[str, FakeServer], batch: RoutedBatch, timeout_s: float = 5.0
) -> FanOutResult:
    pool = FakePool(servers, LAYER, EXPERTS)
    fanout = FanOut(pool, lambda: pool.slots, CONFIG)  # type: ignore[arg-type]
    return await fanout.run(batch, LAYER, Snapshot(pool.slots), Deadline.after(timeout_s))


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
    batch = _batch(20, 0)

    result = asyncio.run(_run(servers, batch))

    output = combine(batch.hidden, result.contributions)
    torch.testing.assert_close(output, _expected(batch))
    assert servers["a"].calls >= 1, "the fault fired"
    assert result.retried_T is not None
    assert result.retried_T.sum() > 0


def test_a_server_without_a_replica_is_asked_again_until_it_answers() -> None:
    servers = {
        "a": FakeServer(HALVES[0], _first(4, UnavailableError("restarting"))),
        "c": FakeServer(HALVES[1], _always(0.0)),
    }
    batch = _batch(8, 1)

    result = asyncio.run(_run(servers, batch))

    torch.testing.assert_close(combine(batch.hidden, result.contributions), _expected(batch))
    assert servers["a"].calls == 5
    assert servers["c"].calls == 1


def test_a_silent_server_is_hedged_and_only_one_answer_counts() -> None:
    servers = {
        "a": FakeServer(HALVES[0], _always(0.06)),
        "b": FakeServer(HALVES[0], _always(0.0)),
        "c": FakeServer(HALVES[1], _always(0.0)),
    }
    batch = _batch(12, 2)

    result = asyncio.run(_run(servers, batch))

    torch.testing.assert_close(combine(batch.hidden, result.contributions), _expected(batch))
    assert servers["a"].suspect


def test_hedges_are_counted_and_ordinary_askings_are_not() -> None:
    async def run(patience_s: float) -> int:
        servers = {
            name: FakeServer(half, _always(0.05), patience_s)
            for name, half in (("a", HALVES[0]), ("b", HALVES[0]), ("c", HALVES[1]))
        }
        pool = FakePool(servers, LAYER, EXPERTS)
        fanout = FanOut(pool, lambda: pool.slots, CONFIG)  # type: ignore[arg-type]
        await fanout.run(_batch(12, 2), LAYER, Snapshot(pool.slots), Deadline.after(5.0))
        return fanout.hedges

    assert asyncio.run(run(patience_s=0.01)) > 0
    assert asyncio.run(run(patience_s=60.0)) == 0


def test_without_a_server_the_error_names_expert_and_layer_before_the_deadline() -> None:
    servers = {"c": FakeServer(HALVES[1], _always(0.0))}

    with pytest.raises(UnavailableError, match=r"expert \d of layer 3"):
        asyncio.run(_run(servers, _batch(4, 3), timeout_s=0.1))


def test_a_request_that_servers_call_invalid_is_not_tried_again() -> None:
    servers = {"a": FakeServer(set(range(EXPERTS)), _always(InvalidRequestError("wrong")))}

    with pytest.raises(InvalidRequestError):
        asyncio.run(_run(servers, _batch(4, 4)))

    assert servers["a"].calls == 1


def test_a_bug_that_repeats_is_reported_and_not_tried_for_ever() -> None:
    servers = {"a": FakeServer(set(range(EXPERTS)), _always(InternalError("bug")))}

    with pytest.raises(InternalError):
        asyncio.run(_run(servers, _batch(4, 5)))

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
    batch = _batch(chance.randint(1, 30), seed)

    result = asyncio.run(_run(servers, batch))

    torch.testing.assert_close(combine(batch.hidden, result.contributions), _expected(batch))


def test_the_hedge_budget_refills_by_its_share() -> None:
    budget = HedgeBudget(burst=2.0, share=0.5)

    spent = [budget.spend(), budget.spend(), budget.spend()]
    budget.earn(1)
    budget.earn(1)

    assert spent == [True, True, False]
    assert budget.spend()
    assert not budget.spend()
