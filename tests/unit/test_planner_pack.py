"""Greedy copies and packing against the same rules written one copy at a time."""

from __future__ import annotations

import numpy as np
import pytest

from load_controller.planner_pack import (
    UNITS,
    Bools,
    Ints,
    Site,
    copy_hottest,
    pack,
    pack_groups,
    quantise,
    server_loads,
    sum_shares,
)
from tests.sites import drawn

SEEDS = range(40)


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300])
def test_loads_become_units_that_add_up_to_about_as_many_in_every_layer(scale: float) -> None:
    units = quantise(np.array([[1.0, 2.0, 5.0], [0.0, 0.0, 4.0]]) * scale)

    assert units.dtype == np.int64
    assert units.tolist() == [[UNITS // 8, UNITS // 4, UNITS * 5 // 8], [0, 0, UNITS]]


def test_a_tiny_layer_beside_a_huge_one_keeps_its_shares() -> None:
    units = quantise(np.array([[1e300, 3e300], [1e-300, 3e-300]]))

    assert units.tolist() == [[UNITS // 4, UNITS * 3 // 4]] * 2


def test_a_share_of_a_unit_is_rounded_and_a_layer_without_load_is_even() -> None:
    units = quantise(np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))

    third = round(UNITS / 3)
    assert units.tolist() == [[third] * 3] * 2


def test_a_server_carries_its_part_of_each_expert_that_it_holds() -> None:
    holds = np.array([[[1, 1, 0], [0, 1, 0], [0, 1, 0]]], np.bool_)

    assert server_loads(np.array([[5, 10, 7]]), holds).tolist() == [[5 + 3, 3, 3]]
    assert server_loads(np.array([[11, 11, 7]]), holds | ~holds).tolist() == [[3 + 3 + 2] * 3]
    assert sum_shares(np.array([[5, 10, 7]]), holds).tolist() == [[15, 10, 10]]


def test_sums_of_a_layers_units_are_exact() -> None:
    units, holds = np.array([[UNITS - 1, 1, 1]]), np.ones((1, 1, 3), np.bool_)

    assert sum_shares(units, holds).tolist() == [[UNITS + 1]]
    assert sum_shares(units, holds).dtype == np.int64


def test_the_home_of_an_expert_is_the_only_node_that_may_hold_it() -> None:
    ones, home = np.ones(3), np.array([[0, 1], [1, 1], [1, 0]])
    site = Site(ones, np.array([2, 2, 2]), np.array([0, 1, 1]), home, run=1, weighted=False)

    assert site.may_hold().tolist() == [
        [[True, False], [False, True], [False, True]],
        [[False, False], [True, True], [True, True]],
        [[False, True], [True, False], [True, False]],
    ]
    assert site.may_hold(np.array([2])).tolist() == site.may_hold()[2:].tolist()
    some = site.rows(np.array([2, 0]))
    assert some.home.tolist() == [[1, 0], [0, 1]]
    assert not some.weighted


def test_groups_go_heaviest_first_to_the_node_that_is_then_done_first() -> None:
    load = np.array([[1, 2, 9, 9, 4, 4, 1, 1], [5, 5, 1, 1, 1, 1, 8, 8]], np.float64)

    even = pack_groups(load, 4, np.array([1.0, 1.0]))
    fast = pack_groups(load, 4, np.array([1.0, 4.0]))
    assert even.dtype == np.int64

    # Of groups 3, 18, 8, 2 the heaviest goes to node 0, the next to 1, which takes the third too.
    assert even.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert fast.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_are_packed_as_one_after_the_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 4))
    groups, run = nodes * int(rng.integers(1, 4)), int(rng.integers(1, 4))
    load = rng.integers(0, 9, (2, groups * run)).astype(np.float64)
    rate = rng.choice([1.0, 2.0, 5.0], nodes)

    found = pack_groups(load, groups, rate)

    for row, home in zip(load, found, strict=True):
        weight = row.reshape(groups, run).sum(1)
        carried, taken, node_of = [0.0] * nodes, [0] * nodes, {}
        for group in sorted(range(groups), key=lambda g: -weight[g]):
            open_ = [n for n in range(nodes) if taken[n] < groups // nodes]
            node = min(open_, key=lambda n: (carried[n] + weight[group]) / rate[n])
            node_of[group] = node
            carried[node] += weight[group]
            taken[node] += 1
        assert home.tolist() == [node_of[expert // run] for expert in range(groups * run)]


def _copied(
    units: list[int], home: list[int], servers_of: list[int], slots: list[int]
) -> list[int]:
    """One layer's numbers of copies, one copy at a time."""
    copies = [1] * len(units)
    for node, total in enumerate(slots):
        mine = [expert for expert, at in enumerate(home) if at == node]
        for _ in range(total - len(mine)):
            short = [expert for expert in mine if copies[expert] < servers_of[node]]
            if short:
                copies[max(short, key=lambda e: units[e] / copies[e])] += 1
    return copies


@pytest.mark.parametrize("seed", SEEDS)
def test_each_copy_goes_to_the_expert_that_then_has_most_load_a_copy(seed: int) -> None:
    task = drawn(np.random.default_rng(seed))

    found = copy_hottest(task.units, task.site, task.slots)

    servers_of = np.bincount(task.site.node).tolist()
    assert found.tolist() == [
        _copied(units, home, servers_of, task.slots.tolist())
        for units, home in zip(task.units.tolist(), task.site.home.tolist(), strict=True)
    ]


def _packed(units: Ints, copies: Ints, holds: Bools, site: Site, home: Ints) -> Bools:
    """One layer's packing, one copy at a time; every server and expert looked at."""
    holds = holds.copy()
    servers, experts = holds.shape
    share = units // copies
    missing = copies - holds.sum(0)
    for expert in sorted(range(experts), key=lambda e: -share[e]):
        for _ in range(missing[expert]):
            load, used = holds @ share, holds.sum(1)
            allowed = site.node[:, None] == home
            can = [s for s in range(servers) if allowed[s, expert] and not holds[s, expert]]
            open_ = [s for s in can if used[s] < site.capacity[s]]
            if open_:
                best = min(open_, key=lambda s: (load[s] + share[expert]) / site.rate[s])
                holds[best, expert] = True
                continue
            trades = [
                (max((load[full] + share[expert] - share[other]) / site.rate[full],
                     (load[roomy] + share[other]) / site.rate[roomy]), roomy, full, other)
                for roomy in range(servers) if used[roomy] < site.capacity[roomy]
                for full in can
                for other in range(experts)
                if holds[full, other] and not holds[roomy, other] and allowed[roomy, other]
            ]  # fmt: skip
            if trades:
                _, roomy, full, other = min(trades)
                holds[full, other], holds[full, expert], holds[roomy, other] = False, True, True
    return holds


@pytest.mark.parametrize("started", [False, True], ids=["from nothing", "from some"])
@pytest.mark.parametrize("seed", SEEDS)
def test_copies_are_packed_as_one_after_the_other(seed: int, started: bool) -> None:
    rng = np.random.default_rng(seed)
    task = drawn(rng)
    copies = copy_hottest(task.units, task.site, task.slots)
    holds = task.empty
    if started:  # some may have more copies than they shall
        holds = task.site.may_hold() & (rng.random(holds.shape) < 0.4)
        holds &= holds.cumsum(2) <= task.site.capacity[:, None]

    before = holds.copy()

    found = pack(task.units, copies, holds, task.site)

    assert (holds == before).all(), "what came in is not written"
    for layer, placed in enumerate(found):
        one = (task.units[layer], copies[layer], holds[layer], task.site, task.site.home[layer])
        assert (placed == _packed(*one)).all()


@pytest.mark.parametrize("seed", range(90))
def test_copies_that_fill_servers_of_unlike_room_are_packed_as_one_after_the_other(
    seed: int,
) -> None:
    """Every slot is used, so that there often is room only where the expert is already."""
    rng = np.random.default_rng(seed)
    servers, experts = int(rng.integers(3, 6)), int(rng.integers(5, 11))
    capacity = rng.integers(1, experts, servers)
    capacity[0] += max(0, experts - int(capacity.sum()))
    rate, none = rng.choice([1.0, 2.0], servers), np.zeros(servers, np.int64)
    site = Site(rate, capacity, none, np.zeros((1, experts), np.int64), experts)
    units = rng.integers(1, 30, (1, experts))
    copies = copy_hottest(units, site, np.minimum(capacity, experts).sum(keepdims=True))
    holds = rng.random((1, servers, experts)) < 0.5
    holds &= (holds.cumsum(2) <= capacity[:, None]) & (holds.cumsum(1) <= copies[:, None, :])

    found = pack(units, copies, holds, site)

    assert (found[0] == _packed(units[0], copies[0], holds[0], site, site.home[0])).all()


def test_another_expert_makes_room_where_only_holders_have_some() -> None:
    """Expert 0 has two copies, and the last slot left is on a server that has one of them."""
    site = Site(np.ones(2), np.array([3, 1]), np.zeros(2, np.int64), np.zeros((1, 3), np.int64), 3)
    start = np.array([[[1, 0, 0], [0, 0, 1]]], np.bool_)

    found = pack(np.array([[20, 4, 6]]), np.array([[2, 1, 1]]), start, site)

    assert found.tolist() == [[[True, True, True], [True, False, False]]]
