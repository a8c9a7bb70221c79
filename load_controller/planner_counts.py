"""Other numbers of copies than the greedy ones, where those pack badly. Pure; numpy only.

Greedy copying gives the least largest share, not the best packing: with two slots a server, say,
one copy more of a middling expert may let every pair come out even. So layers that stay uneven
are packed again with one copy of some expert given to another, and the best is kept.
"""

from __future__ import annotations

import numpy as np

from load_controller.planner_pack import Bools, Ints, Site, pack
from load_controller.planner_search import Cost, improve, violation
from load_controller.planner_spread import spread

#: Layers within this of the best that their largest share allows are even enough.
EVEN_ENOUGH = 0.01
#: Rounds of giving one copy away; in each, the variants of a layer, and the work: slots in all
#: variants of all layers together.
ROUNDS = 5
VARIANTS = 64
WORK = 40_000


def repack(units: Ints, copies: Ints, holds: Bools, site: Site) -> tuple[Ints, Bools]:
    """Numbers of copies [L, E] and placement [L, S, E], at least as even as those given."""
    copies, holds = copies.copy(), holds.copy()
    layers, servers, experts = holds.shape
    even = units.sum(1) / site.rate.sum()
    found = violation(spread(units, holds, site).sum(2), site.rate)
    open_ = np.arange(layers)
    for _ in range(ROUNDS):
        bound = (units[open_] // copies[open_]).max(1) / site.rate.max() / even[open_] - 1.0
        open_ = open_[found[open_] > np.maximum(bound, 0.0) + EVEN_ENOUGH]
        if not len(open_):
            break
        afford = WORK // (len(open_) * int(copies[0].sum() + servers))
        most = min(VARIANTS, max(1, afford))
        rows, tried = _variants(units, copies, open_, site, most)
        if not len(rows):
            break
        there = site.rows(rows)
        packed = pack(units[rows], tried, np.zeros((len(rows), servers, experts), np.bool_), there)
        packed = improve(units[rows], packed, there, Cost(packed, 0.0))
        reached = violation(spread(units[rows], packed, site).sum(2), site.rate)
        better = []
        for layer in open_:
            mine = np.flatnonzero(rows == layer)
            if len(mine) and reached[best := mine[reached[mine].argmin()]] < found[layer] - 1e-9:
                found[layer], holds[layer], copies[layer] = reached[best], packed[best], tried[best]
                better.append(layer)
        open_ = np.array(better, np.int64)
    return copies, holds


def _variants(units: Ints, copies: Ints, layers: Ints, site: Site, most: int) -> tuple[Ints, Ints]:
    """For each layer up to `most` other numbers of copies: the layer of each, and [V, E].

    One copy goes from an expert that has several to another of its node; first the trades after
    which the larger of the two shares is smallest.
    """
    rows, tried = [], []
    servers_of = np.bincount(site.node)
    for layer in layers:
        share = units[layer] / copies[layer]
        fewer = np.where(copies[layer] > 1, units[layer] / np.maximum(copies[layer] - 1, 1), np.inf)
        home = site.home[layer]
        trade = fewer[:, None] - 1e-3 * share  # [from, to]
        trade[(home[:, None] != home) | (copies[layer] >= servers_of[home])] = np.inf
        np.fill_diagonal(trade, np.inf)
        for flat in np.argsort(trade, axis=None, kind="stable")[:most]:
            source, target = np.unravel_index(flat, trade.shape)
            if np.isfinite(trade[source, target]):
                variant = copies[layer].copy()
                variant[source] -= 1
                variant[target] += 1
                rows.append(layer)
                tried.append(variant)
    return np.array(rows, np.int64), np.array(tried, np.int64).reshape(-1, units.shape[1])
