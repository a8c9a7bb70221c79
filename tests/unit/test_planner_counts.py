"""Other numbers of copies, where the greedy ones pack badly: each tried by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from load_controller import planner_counts
from load_controller.planner_counts import EVEN_ENOUGH, ROUNDS, VARIANTS, _variants, repack
from load_controller.planner_pack import Bools, Ints, Site, copy_hottest, pack
from load_controller.planner_search import Cost, improve, violation
from load_controller.planner_spread import spread
from tests.sites import drawn


def _uneven(units: Ints, holds: Bools, site: Site) -> float:
    """MaxVio of one layer."""
    return float(violation(spread(units[None], holds[None], site).sum(2), site.rate)[0])


def _trades(units: Ints, copies: Ints, site: Site) -> list[Ints]:
    """What one layer's copies may become when one expert gives one of several to another."""
    home, servers_of = site.home[0], np.bincount(site.node)
    share, found = units / copies, []
    for source in range(len(units)):
        for target in range(len(units)):
            if source == target or copies[source] < 2 or home[source] != home[target]:
                continue
            if copies[target] < servers_of[home[target]]:
                after = copies.copy()
                after[[source, target]] += [-1, 1]
                found.append((units[source] / after[source] - 1e-3 * share[target], after))
    return [after for _, after in sorted(found, key=lambda trade: trade[0])][:VARIANTS]


def _repacked(units: Ints, copies: Ints, holds: Bools, site: Site) -> tuple[Ints, Bools]:
    """One layer: the best trade, as long as one helps and the layer is not even enough."""
    even = units.sum() / site.rate.sum()
    for _ in range(ROUNDS):
        best = max(0.0, (units // copies).max() / site.rate.max() / even - 1.0)
        now = _uneven(units, holds, site)
        if now <= best + EVEN_ENOUGH:
            break
        tried = []
        for order, after in enumerate(_trades(units, copies, site)):
            packed = pack(units[None], after[None], np.zeros_like(holds)[None], site)
            packed = improve(units[None], packed, site, Cost(packed, 0.0))
            tried.append((_uneven(units, packed[0], site), order, after, packed[0]))
        reached = min(tried, key=lambda each: each[:2], default=None)
        if reached is None or reached[0] >= now - 1e-9:
            break
        _, _, copies, holds = reached
    return copies, holds


@pytest.mark.parametrize("seed", range(30))
def test_one_copy_at_a_time_is_given_away_as_long_as_that_evens_the_layer_out(seed: int) -> None:
    task = drawn(np.random.default_rng(seed))
    units = task.units + 1
    copies = copy_hottest(units, task.site, task.slots)
    holds = pack(units, copies, task.empty, task.site)
    before = copies.copy(), holds.copy()

    counts, found = repack(units, copies, holds, task.site)

    assert (copies == before[0]).all()
    assert (holds == before[1]).all()
    for layer in range(len(units)):
        site = replace(task.site, home=task.site.home[layer : layer + 1])
        one = _repacked(units[layer], copies[layer], holds[layer], site)
        assert counts[layer].tolist() == one[0].tolist()
        assert (found[layer] == one[1]).all()


@pytest.mark.parametrize("most", [1, 5, VARIANTS])
@pytest.mark.parametrize("seed", range(10))
def test_the_trades_that_leave_the_least_large_shares_come_first(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    task = drawn(rng)
    units = task.units + 1
    servers_of = np.bincount(task.site.node)[task.site.home]
    copies = rng.integers(1, servers_of + 1)  # the greedy ones have one of each trade at most

    rows, tried = _variants(units, copies, np.arange(len(units)), task.site, most)

    for layer in range(len(units)):
        site = replace(task.site, home=task.site.home[layer : layer + 1])
        expected = _trades(units[layer], copies[layer], site)[:most]
        assert tried[rows == layer].tolist() == [after.tolist() for after in expected]


#: One expert that takes eight of twelve units by itself, and two servers with room for three.
HOT = np.array([[8, 1, 1, 2]]) * 1000
PAIR = Site(np.ones(2), np.array([3, 3]), np.zeros(2, np.int64), np.zeros((1, 4), np.int64), run=4)


def test_what_is_as_even_as_its_largest_share_allows_is_left_alone() -> None:
    copies = np.array([[1, 1, 1, 2]])
    holds = np.array([[[1, 0, 0, 1], [0, 1, 1, 1]]], np.bool_)
    assert _uneven(HOT[0], holds[0], PAIR) == pytest.approx(8 / 6 - 1)
    fuller = np.array([[[1, 1, 0, 1], [0, 0, 1, 1]]], np.bool_)
    assert _uneven(HOT[0], fuller[0], PAIR) == pytest.approx(9 / 6 - 1)

    assert repack(HOT, copies, holds, PAIR)[0].tolist() == copies.tolist()
    assert repack(HOT, copies, fuller, PAIR)[0].tolist() == [[2, 1, 1, 1]]


@pytest.mark.parametrize(
    ("work", "most"), [(10**9, VARIANTS), (2 * 7 * 5, 5), (2 * 7 * 5 - 1, 4), (1, 1)]
)
def test_the_work_of_a_round_is_bounded_over_all_its_layers(
    monkeypatch: pytest.MonkeyPatch, work: int, most: int
) -> None:
    """Two layers of five slots on two servers: a variant of both is fourteen units of work."""
    asked = []

    def noted(
        units: Ints, copies: Ints, layers: Ints, site: Site, most: int
    ) -> tuple[Ints, Ints]:  # fmt: skip
        asked.append(most)
        return _variants(units, copies, layers, site, most)

    monkeypatch.setattr(planner_counts, "WORK", work)
    monkeypatch.setattr(planner_counts, "_variants", noted)
    site = replace(PAIR, home=np.zeros((2, 4), np.int64))
    fuller = np.array([[[1, 1, 0, 1], [0, 0, 1, 1]]] * 2, np.bool_)

    repack(HOT.repeat(2, 0), np.array([[1, 1, 1, 2]] * 2), fuller, site)

    assert asked[0] == most
