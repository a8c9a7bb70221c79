"""From a current placement to a better one: each candidate made and judged one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from load_controller import planner_stay
from load_controller.planner_counts import repack
from load_controller.planner_pack import Bools, Floats, Ints, Site, copy_hottest, pack
from load_controller.planner_search import Cost, improve, match_servers, violation
from load_controller.planner_spread import spread
from load_controller.planner_stay import ROUNDS, Task, from_current, from_nothing
from tests.sites import Drawn, drawn


def _task(task: Drawn, price: float = 0.01, least_gain: float = 0.01) -> Task:
    counted = np.ones(len(task.units), np.bool_)
    return Task(task.units + 1, counted, task.site, task.slots, price, least_gain)


def _of_layer(task: Task, layer: int) -> Task:
    return replace(
        task,
        units=task.units[layer : layer + 1],
        counted=task.counted[layer : layer + 1],
        site=replace(task.site, home=task.site.home[layer : layer + 1]),
    )


def _home(site: Site, holds: Bools) -> Ints:
    """Where most copies of each group are, if every node then has equally many experts."""
    nodes, experts = int(site.node.max()) + 1, holds.shape[1]
    home = []
    for first in range(0, experts, site.run):
        copies = holds[:, first : first + site.run].sum(1)
        votes = [int(copies[site.node == node].sum()) for node in range(nodes)]
        home += [votes.index(max(votes))] * site.run
    if any(home.count(node) != experts // nodes for node in range(nodes)):
        return site.home[0]
    return np.array(home)


def _whole(task: Task, site: Site, holds: Bools) -> bool:
    """Whether a placement may stay as it is."""
    home = site.home[0]
    servers, experts = np.nonzero(holds)
    return bool(
        holds.any(0).all()
        and (holds.sum(1) <= site.capacity).all()
        and (site.node[servers] == home[experts]).all()
        and all(holds[site.node == n].sum() <= slots for n, slots in enumerate(task.slots))
    )


def _kept(task: Task, site: Site, copies: Ints, holds: Bools) -> Bools:
    """What may stay of a placement, one copy taken away after the other."""
    kept = holds & (site.node[:, None] == site.home[0])
    share = task.units[0] // copies
    for server in range(len(kept)):
        held = np.flatnonzero(kept[server])
        copies_now = kept.sum(0)
        dropped = sorted(held, key=lambda e: (-copies_now[e], share[e]))
        for expert in dropped[: max(0, len(held) - int(site.capacity[server]))]:
            kept[server, expert] = False
    for expert in range(kept.shape[1]):
        for _ in range(int(kept[:, expert].sum()) - int(copies[expert])):
            time = (kept @ share) / site.rate
            fullest = max(np.flatnonzero(kept[:, expert]), key=lambda s: time[s])
            kept[fullest, expert] = False
    return kept


def _stepped(task: Task, holds: Bools, fresh: Bools) -> Bools:
    """One layer's cheapest: staying, mending, or planning anew with servers renamed."""
    start = holds[None]
    site = replace(task.site, home=_home(task.site, holds)[None])
    copies = fresh.sum(0)
    if (site.home != task.site.home).any():
        copies = copy_hottest(task.units, site, task.slots)[0]
    mended = pack(task.units, copies[None], _kept(task, site, copies, holds)[None], site)
    mended = improve(task.units, mended, site, Cost(start, task.price))
    renamed = match_servers(fresh[None], start, task.site)

    def cost(planned: Bools, least_gain: float) -> float:
        uneven = violation(spread(task.units, planned, site).sum(2), site.rate)[0]
        uneven = uneven if task.counted[0] else 0.0
        return float(uneven + task.price * (planned & ~start).sum() + least_gain)

    choices = [(cost(start, 0.0) if _whole(task, site, holds) else np.inf, 0, start)]
    choices += [(cost(mended, task.least_gain), 1, mended)]
    choices += [(cost(renamed, task.least_gain), 2, renamed)]
    return np.asarray(min(choices, key=lambda choice: choice[:2])[2][0])


@pytest.mark.parametrize("seed", range(15))
def test_from_nothing_is_greedy_then_improved_then_packed_with_other_counts(seed: int) -> None:
    task = _task(drawn(np.random.default_rng(seed)))

    found = from_nothing(task)

    for layer in range(len(found)):
        one = _of_layer(task, layer)
        copies = copy_hottest(one.units, one.site, one.slots)
        empty = np.zeros((1, *found.shape[1:]), np.bool_)
        packed = pack(one.units, copies, empty, one.site)
        packed = improve(one.units, packed, one.site, Cost(packed, 0.0))
        assert (found[layer] == repack(one.units, copies, packed, one.site)[1][0]).all()


def test_from_nothing_swaps_copies_whatever_that_loads() -> None:
    ones, zeros = np.ones(4), np.zeros(4, np.int64)
    site = Site(ones, np.full(4, 8), zeros, np.zeros((3, 24), np.int64), 24, weighted=False)
    units = (np.random.default_rng(0).lognormal(0.0, 1.0, (3, 24)) * 2**20).astype(np.int64)
    task = Task(units, np.ones(3, np.bool_), site, np.array([24]), 0.01, 0.01)
    copies = copy_hottest(units, site, task.slots)
    packed = pack(units, copies, np.zeros((3, 4, 24), np.bool_), site)
    swapped = improve(units, packed, site, Cost(packed, 0.0))
    assert (task.violation(swapped) < task.violation(packed)).all()

    assert (from_nothing(task) == repack(units, copies, swapped, site)[1]).all()


def _current(task: Drawn, rng: np.random.Generator, kind: str) -> Bools:
    """A placement that may stay, one that lost or gained some copies in one layer or in all, or a
    wild one."""
    home = task.site.home[:, rng.permutation(task.units.shape[1])] if kind == "wild" else None
    site = task.site if home is None else replace(task.site, home=home)
    copies = copy_hottest(task.units[:, ::-1], site, task.slots)
    holds = pack(rng.integers(1, 99, task.units.shape), copies, task.empty, site)
    if kind == "first broken":
        holds[0] ^= rng.random(holds[0].shape) < 0.3
    elif kind != "whole":
        holds ^= rng.random(holds.shape) < 0.15
    return holds


@pytest.mark.parametrize("kind", ["whole", "first broken", "broken", "wild"])
@pytest.mark.parametrize("seed", range(20))
def test_each_layer_goes_to_its_cheapest_candidate_until_it_stays(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    drawn_task = drawn(rng, weighted=bool(seed % 2))
    price, least_gain = [(0.01, 0.01), (0.0, 0.0), (0.1, 0.2)][seed % 3]
    task = _task(drawn_task, price, least_gain)
    if seed % 5 == 0:
        task.counted[0] = False
    current = _current(drawn_task, rng, kind)
    before = current.copy()

    found = from_current(task, current)

    assert (current == before).all()
    fresh = from_nothing(task)
    for layer in range(len(found)):
        one, holds = _of_layer(task, layer), current[layer]
        for _ in range(ROUNDS):
            after = _stepped(one, holds, fresh[layer])
            if (after == holds).all():
                break
            holds = after
        assert (found[layer] == holds).all()


def test_a_layer_that_stays_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    drawn_task = drawn(rng)
    task = _task(drawn_task)
    assert len(task.units) > 1
    settled = from_current(task, _current(drawn_task, rng, "whole"))
    start = settled.copy()
    start[-1] = False  # this one has everything to load
    step, planned = planner_stay._step, []

    def noted(task: Task, here: Bools, fresh: Bools) -> Bools:
        planned.append(len(here))
        return step(task, here, fresh)

    monkeypatch.setattr(planner_stay, "_step", noted)

    found = from_current(task, start)

    assert (found[:-1] == settled[:-1]).all()
    assert planned[0] == len(task.units), "at first all are looked at"
    assert planned[1:] == [1] * (len(planned) - 1), "then the one that moved"
    assert 2 <= len(planned) < ROUNDS


def _violation(task: Task, holds: Bools) -> Floats:
    return task.violation(np.array([holds, holds], np.bool_))


def test_nothing_is_gained_by_moving_a_layer_without_load() -> None:
    ones, zeros = np.ones(2), np.zeros(2, np.int64)
    site = Site(ones, np.array([2, 2]), zeros, np.zeros((2, 2), np.int64), run=2)
    counted = np.array([True, False])
    task = Task(np.array([[1, 3], [1, 3]]), counted, site, np.array([2]), 0.1, 0.1)

    assert _violation(task, np.array([[1, 0], [0, 1]])).tolist() == [0.5, 0.0]
    assert _violation(task, np.array([[1, 1], [0, 0]])).tolist() == [1.0, 0.0]
    some = task.rows(np.array([1]))
    assert (some.units.tolist(), some.counted.tolist()) == ([[1, 3]], [False])
    assert (len(some.site.home), some.price, some.least_gain) == (1, 0.1, 0.1)
