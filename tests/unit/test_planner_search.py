"""The search for a more even placement, against the same steps taken one by one."""

from __future__ import annotations

import numpy as np
import pytest

from load_controller.planner_pack import Bools, Floats, Ints, Site, copy_hottest, pack, server_loads
from load_controller.planner_search import (
    LEAST_GAIN,
    PARTNERS,
    Cost,
    improve,
    match_servers,
    violation,
)
from tests.sites import Drawn, drawn

SEEDS = range(40)


def _site(rates: list[float], capacity: list[int], experts: int) -> Site:
    node, home = np.zeros(len(rates), np.int64), np.zeros((1, experts), np.int64)
    return Site(np.array(rates), np.array(capacity), node, home, experts)


def test_violation_is_the_excess_of_the_slowest_server_over_an_even_time() -> None:
    loads = np.array([[6, 2, 4], [1, 1, 10], [0, 0, 0]])

    assert violation(loads, np.ones(3)).tolist() == pytest.approx([0.5, 1.5, 0.0])
    assert violation(loads, np.array([1.0, 1.0, 4.0])).tolist() == pytest.approx([2.0, 0.25, 0.0])
    assert violation(np.array([[0.25, 0.5]]), np.ones(2)).tolist() == pytest.approx([1 / 3])


def test_a_placement_costs_its_unevenness_and_a_price_for_each_slot_to_load() -> None:
    site = _site([1.0, 1.0], [2, 2], 2)
    start = np.array([[[1, 0], [0, 1]]], np.bool_)
    other = np.array([[[1, 1], [0, 1]]], np.bool_)  # expert 1 twice: 2 + 3 against 3
    units = np.array([[2, 6]])

    assert Cost(start, 0.25).of(start, units, site).tolist() == [0.5]
    assert Cost(start, 0.25).of(other, units, site).tolist() == [0.5]
    assert Cost(other, 0.25).of(start, units, site).tolist() == [0.5]
    assert Cost(~start, 0.25).of(other, units, site).tolist() == [0.75]


class _Layer:
    """One layer's search, a swap at a time: places that may be empty, and who may go where."""

    def __init__(self, units: Ints, holds: Bools, site: Site) -> None:
        self.site, self.experts = site, holds.shape[1]
        self.share = [*(units // np.maximum(holds.sum(0), 1)).tolist(), 0]
        width = int(site.capacity.max())
        self.slots = [np.flatnonzero(row).tolist() for row in holds]
        for row in self.slots:
            row += [self.experts] * (width - len(row))

    def loads(self) -> Floats:
        return np.array([sum(self.share[e] for e in row) for row in self.slots], np.float64)

    def swaps(self) -> list[tuple[float, int, int, int, int]]:
        """Time of the fuller server after each swap of a place of the fullest, best first."""
        site, loads = self.site, self.loads()
        time = loads / site.rate
        a = int(time.argmax())
        others = [s for s in range(len(time)) if s != a and site.node[s] == site.node[a]]
        found = []
        for order, b in enumerate(sorted(others, key=lambda s: time[s])[:PARTNERS]):
            room = sum(e < self.experts for e in self.slots[b]) < site.capacity[b]
            for i, mine in enumerate(self.slots[a]):
                for j, other in enumerate(self.slots[b]):
                    empty = other == self.experts
                    if mine == self.experts or mine in self.slots[b]:
                        continue
                    if (empty and not room) or (not empty and other in self.slots[a]):
                        continue
                    shift = self.share[mine] - self.share[other]
                    peak = max((loads[a] - shift) / site.rate[a], (loads[b] + shift) / site.rate[b])
                    found.append((peak, order, i, j, b))
        return sorted(found)

    def swap(self, i: int, b: int, j: int) -> None:
        a = int((self.loads() / self.site.rate).argmax())
        self.slots[a][i], self.slots[b][j] = self.slots[b][j], self.slots[a][i]

    def holds(self) -> Bools:
        table = np.zeros((len(self.slots), self.experts + 1), np.bool_)
        for row, held in zip(table, self.slots, strict=True):
            row[held] = True
        return table[:, :-1]


def _searched(units: Ints, holds: Bools, site: Site, start: Bools, price: float) -> Bools:
    """The cheapest placement of one layer on the way downhill."""
    layer, cost = _Layer(units, holds, site), Cost(start[None], price)
    best, least = holds, float(cost.of(holds[None], units[None], site)[0])
    gain = max(LEAST_GAIN, price / 8) * units.sum() / site.rate.sum()
    while swaps := layer.swaps():
        peak, _, i, j, b = swaps[0]
        if not peak < (layer.loads() / site.rate).max() - gain:
            break
        layer.swap(i, b, j)
        now = float(cost.of(layer.holds()[None], units[None], site)[0])
        if now < least - 1e-12:
            best, least = layer.holds(), now
    return best


def _placed(task: Drawn) -> Bools:
    """Copies where they may be, without regard to loads."""
    copies = copy_hottest(task.units, task.site, task.slots)
    return pack(np.ones_like(task.units), copies, task.empty, task.site)


@pytest.mark.parametrize("price", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_takes_the_best_swap_of_the_fullest_server_as_long_as_one_helps(
    seed: int, price: float
) -> None:
    rng = np.random.default_rng(seed)
    task = drawn(rng)
    holds = _placed(task)
    start = holds if price == 0.2 else task.site.may_hold() & (rng.random(holds.shape) < 0.5)
    before = holds.copy()

    found = improve(task.units, holds, task.site, Cost(start, price))

    assert (holds == before).all()
    for layer, placed in enumerate(found):
        one = (task.units[layer], holds[layer], task.site, start[layer], price)
        assert (placed == _searched(*one)).all()
    assert (found.sum(1) == holds.sum(1)).all()
    cost = Cost(start, price)
    assert (cost.of(found, task.units, task.site) <= cost.of(holds, task.units, task.site)).all()


@pytest.mark.parametrize("price", [0.0, 0.02])
@pytest.mark.parametrize("room", [0, 9], ids=["full", "crowded"])
@pytest.mark.parametrize("seed", range(30))
def test_a_search_from_crowded_servers_goes_the_same_way(
    seed: int, room: int, price: float
) -> None:
    """The first two servers have it all, so that most steps go to empty places of the others."""
    rng = np.random.default_rng(seed)
    servers, experts = int(rng.integers(3, 7)), int(rng.integers(8, 15))
    first = rng.integers(0, 2, experts)
    holds = np.zeros((1, servers, experts), np.bool_)
    holds[0, first, np.arange(experts)] = True
    capacity = [*np.maximum(holds[0, :2].sum(1), 1) + room, *rng.integers(2, 6, servers - 2)]
    site = _site(rng.choice([1.0, 1.0, 2.0], servers).tolist(), capacity, experts)
    start = rng.random(holds.shape) < 0.4
    units = rng.integers(1, 40, (1, experts))

    found = improve(units, holds, site, Cost(start, price))

    assert (found[0] == _searched(units[0], holds[0], site, start[0], price)).all()


def test_a_copy_that_goes_to_an_empty_place_is_one_slot_to_load() -> None:
    """From 9 and 1 to 6 and 4: 0.6 less MaxVio, which is worth one slot to load, but not two."""
    site = _site([1.0, 1.0], [3, 2], 4)
    start = np.array([[[1, 1, 1, 0], [0, 0, 0, 1]]], np.bool_)

    found = improve(np.array([[3, 3, 3, 1]]), start, site, Cost(start, 0.4))

    assert found.astype(int).tolist() == [[[0, 1, 1, 0], [1, 0, 0, 1]]]


def test_a_layer_without_load_is_left_as_it_is() -> None:
    holds = np.array([[[1, 1, 0], [0, 0, 1]]], np.bool_)

    found = improve(np.zeros((1, 3), np.int64), holds, _site([1.0] * 2, [2, 2], 3), Cost(holds, 0))

    assert (found == holds).all()


def test_the_fullest_server_tries_the_16_least_loaded_and_no_others() -> None:
    """Nineteen servers with one expert each. Only what the 17th lightest has would even out the
    fullest, whose 90 and 30 nobody lighter can take without becoming as full."""
    units = np.array([[90, 30, *[75] * 16, 76, 40]])
    holds = np.zeros((1, 19, 20), np.bool_)
    holds[0, 0, [0, 1]] = True
    holds[0, np.arange(1, 19), np.arange(2, 20)] = True
    site = _site([1.0] * 19, [2] + [1] * 18, 20)

    found = improve(units, holds, site, Cost(holds, 0.0))

    loads = server_loads(units, found)[0]
    assert loads.max() < 120


def _renamed(holds: Bools, current: Bools, site: Site) -> Bools:
    """One layer with servers renamed: those that share most first, then who is left in order."""
    servers = range(len(holds))
    key = [(site.node[s], site.rate[s], site.capacity[s]) for s in servers]
    common = (holds.astype(int) @ current.astype(int).T).tolist()
    pairs = [(n, o) for n in servers for o in servers if key[n] == key[o] and common[n][o]]
    name: dict[int, int] = {}
    for n, o in sorted(pairs, key=lambda pair: -common[pair[0]][pair[1]]):
        if n not in name and o not in name.values():
            name[n] = o
    for n in servers:
        if n not in name:
            free = [o for o in servers if key[o] == key[n] and o not in name.values()]
            name[n] = free[0]
    return np.array([holds[n] for o in servers for n in servers if name[n] == o])


@pytest.mark.parametrize("alike", [True, False], ids=["most alike", "few alike"])
@pytest.mark.parametrize("seed", SEEDS)
def test_servers_that_are_alike_are_renamed_so_that_most_experts_stay(
    seed: int, alike: bool
) -> None:
    rng = np.random.default_rng(seed)
    task = drawn(rng)
    site, shape = task.site, task.empty.shape
    if alike:
        servers = int(rng.integers(3, 8))
        site, shape = _site([*[1.0] * servers, 2.0], [3] * (servers + 1), 5), (2, servers + 1, 5)
    holds, current = rng.random(shape) < 0.4, rng.random(shape) < 0.4

    found = match_servers(holds, current, site)

    for layer in range(shape[0]):
        assert (found[layer] == _renamed(holds[layer], current[layer], site)).all()


def test_of_many_servers_that_share_as_much_the_first_keep_their_names() -> None:
    """One has what each of them had: an order of equals that is any order would mix them up."""
    site = _site([1.0] * 24, [24] * 24, 24)
    holds, current = np.eye(24, dtype=np.bool_)[None], np.ones((1, 24, 24), np.bool_)

    assert (match_servers(holds, current, site) == holds).all()
