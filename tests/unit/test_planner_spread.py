"""How rows are divided over copies: poured one expert after the other, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from load_controller.planner_pack import Bools, Floats, Ints, Site, copy_hottest, pack
from load_controller.planner_spread import SWEEPS, spread
from tests.sites import drawn


def _site(rates: list[float], experts: int, *, weighted: bool = True) -> Site:
    servers = len(rates)
    return Site(
        rate=np.array(rates),
        capacity=np.full(servers, experts),
        node=np.zeros(servers, np.int64),
        home=np.zeros((1, experts), np.int64),
        run=experts,
        weighted=weighted,
    )


def test_copies_of_one_expert_carry_by_the_speed_of_their_servers() -> None:
    amount = spread(np.array([[12]]), np.ones((1, 3, 1), np.bool_), _site([1.0, 2.0, 3.0], 1))

    assert amount[0, :, 0].tolist() == pytest.approx([2.0, 4.0, 6.0])


def test_a_server_that_is_busy_with_other_experts_gets_none_above_its_level() -> None:
    """Expert 0 is on all three; the others keep server 0 busy for 9 and server 1 for 4."""
    holds = np.array([[[1, 1, 0], [1, 0, 1], [1, 0, 0]]], np.bool_)

    amount = spread(np.array([[6, 9, 4]]), holds, _site([1.0, 1.0, 1.0], 3))

    assert amount[0, :, 0].tolist() == pytest.approx([0.0, 1.0, 5.0])
    assert amount[0, :, 1:].tolist() == [[9.0, 0.0], [0.0, 4.0], [0.0, 0.0]]


def test_without_weights_an_experts_rows_are_divided_evenly() -> None:
    holds = np.array([[[1, 1, 0], [1, 0, 0], [1, 0, 0]]], np.bool_)

    amount = spread(np.array([[6, 9, 4]]), holds, _site([1.0, 2.0, 9.0], 3, weighted=False))

    assert amount[0, :, 0].tolist() == [2.0, 2.0, 2.0]
    assert amount[0, :, 2].tolist() == [0.0, 0.0, 0.0], "nobody holds it"


def _level(total: float, others: list[float], rates: list[float]) -> float:
    """The time at which servers that are busy for other / rate have done `total` besides."""
    low, high = 0.0, max(o / r for o, r in zip(others, rates, strict=True)) + total / min(rates)
    for _ in range(200):
        middle = (low + high) / 2
        done = sum(max(0.0, middle * r - o) for o, r in zip(others, rates, strict=True))
        low, high = (middle, high) if done < total else (low, middle)
    return high


def _poured(units: Ints, holds: Bools, rate: Floats) -> Floats:
    """One layer, poured one expert at a time to a level found by bisection."""
    amount = np.where(holds, units / np.maximum(holds.sum(0), 1), 0.0)
    several = [e for e in range(len(units)) if holds[:, e].sum() > 1]
    for _ in range(SWEEPS):
        for expert in sorted(several, key=lambda e: -units[e]):
            at = np.flatnonzero(holds[:, expert])
            other = amount.sum(1)[at] - amount[at, expert]
            level = _level(float(units[expert]), other.tolist(), rate[at].tolist())
            amount[at, expert] = np.maximum(0.0, level * rate[at] - other)
    return amount


@pytest.mark.parametrize("seed", range(40))
def test_every_expert_is_poured_over_its_copies_to_one_level(seed: int) -> None:
    rng = np.random.default_rng(seed)
    task = drawn(rng)
    copies = copy_hottest(task.units, task.site, task.slots)
    holds = pack(task.units, copies, task.empty, task.site)
    if seed % 4 == 0:  # an expert that nobody holds
        holds[:, :, 0] = False
    before = holds.copy()

    amount = spread(task.units, holds, task.site)

    assert (holds == before).all()
    most = max(1.0, float(task.units.max()))
    for units, placed, found in zip(task.units, holds, amount, strict=True):
        expected = _poured(units, placed, task.site.rate)
        assert found / most == pytest.approx(expected / most, abs=1e-9)
