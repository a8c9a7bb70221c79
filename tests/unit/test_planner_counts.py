"""Other numbers of copies, where the greedy ones pack badly: each tried by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from load_controller.planner_counts import EVEN_ENOUGH, ROUNDS, VARIANTS, repack
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
