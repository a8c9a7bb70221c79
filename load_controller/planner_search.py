"""Local search on a packed placement, and fitting it to the current one. Pure; numpy only.

Shapes as in `planner_pack`; C is the largest capacity of a server, and a slot table [L, S, C]
lists the experts that each server holds, E where a place is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from load_controller.planner_pack import Bools, Floats, Ints, Site, server_loads

#: Partners that the fullest server tries: the least loaded ones of its node.
PARTNERS = 16
#: A step must lower the fuller of the two servers by this share of the mean load.
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Cost:
    """What a layer's placement costs: MaxVio + price * slots loaded, counted from `start`."""

    start: Bools  # [L, S, E]
    price: float  # of one loaded slot, in units of MaxVio

    def of(self, holds: Bools, units: Ints, site: Site) -> Floats:
        """[L]: the objective of each layer."""
        loads = (holds & ~self.start).sum((1, 2))
        return np.asarray(violation(server_loads(units, holds), site.rate) + self.price * loads)


def violation(load: Ints | Floats, rate: Floats) -> Floats:
    """[L]: MaxVio over servers, max_s(load_s / rate_s) / (sum load / sum rate) - 1.

    With equal rates this is (max - mean) / mean. 0 where there is no load.
    """
    even = load.sum(1) / rate.sum()
    return np.asarray(
        np.where(even > 0, (load / rate).max(1) / np.where(even > 0, even, 1.0) - 1.0, 0.0)
    )


class _Tables:
    """The state of a search over some layers: slot tables, loads, who holds what."""

    def __init__(self, units: Ints, holds: Bools, site: Site) -> None:
        layers, servers, experts = holds.shape
        self.site = site
        self.experts = experts
        self.holds = np.zeros((layers, servers, experts + 1), np.bool_)  # column E: empty
        self.holds[:, :, :experts] = holds
        share = units // np.maximum(holds.sum(1), 1)
        self.share = np.concatenate([share, np.zeros((layers, 1), np.int64)], 1)
        self.slots = _slot_table(holds, int(site.capacity.max()))
        self.used = holds.sum(2)
        self.load = server_loads(units, holds)

    def swap(self, rows: Ints, one: tuple[Ints, Ints], two: tuple[Ints, Ints]) -> None:
        """Exchanges the contents of two places, (server, column) each, in every row."""
        (a, i), (b, j) = one, two
        of_a, of_b = self.slots[rows, a, i], self.slots[rows, b, j]
        self.slots[rows, a, i], self.slots[rows, b, j] = of_b, of_a
        self.holds[rows, a, of_a] = self.holds[rows, b, of_b] = False
        self.holds[rows, a, of_b] = self.holds[rows, b, of_a] = True
        self.holds[rows, a, self.experts] = False  # of empty places a server may get several
        shift = self.share[rows, of_a] - self.share[rows, of_b]
        self.load[rows, a] -= shift
        self.load[rows, b] += shift
        self.used[rows, a] -= of_b == self.experts
        self.used[rows, b] += of_b == self.experts


def _slot_table(holds: Bools, width: int) -> Ints:
    """[L, S, C] ascending expert ids, E where empty."""
    layers, servers, experts = holds.shape
    table = np.full((layers, servers, width), experts)
    layer, server, expert = np.nonzero(holds)
    place = (holds.cumsum(2) - 1)[layer, server, expert]
    table[layer, server, place] = expert
    return table


def _held(slots: Ints, experts: int) -> Bools:
    """[L, S, E] from a slot table."""
    holds = np.zeros((*slots.shape[:2], experts + 1), np.bool_)
    np.put_along_axis(holds, slots, True, 2)
    return holds[:, :, :experts]


def improve(units: Ints, holds: Bools, site: Site, cost: Cost) -> Bools:
    """[L, S, E]: the cheapest placement met on the way downhill from `holds`.

    Each step takes a layer's fullest server and exchanges one of its copies for a lighter one, or
    for an empty place, of another server, so that the fuller of the two afterwards is as little
    loaded as can be; it ends where no step helps. The load never rises on the way, so with a
    price of zero the last placement is the cheapest.
    """
    tables = _Tables(units, holds, site)
    best, best_cost = tables.slots.copy(), cost.of(holds, units, site)
    loaded = (holds & ~cost.start).sum((1, 2))
    least = max(LEAST_GAIN, cost.price / 8)  # smaller steps will not pay for their loads
    gain = least * units.sum(1) / site.rate.sum()
    moving = np.arange(len(units))
    while len(moving):
        a, i, b, j, peak = _best_swap(tables, moving)
        helps = peak < (tables.load[moving] / site.rate).max(1) - gain[moving]
        moving, a, i, b, j = (each[helps] for each in (moving, a, i, b, j))
        loaded[moving] += _newly_loaded(tables, cost.start, moving, (a, i), (b, j))
        tables.swap(moving, (a, i), (b, j))
        now = violation(tables.load[moving], site.rate) + cost.price * loaded[moving]
        better = moving[now < best_cost[moving]]
        best[better], best_cost[better] = tables.slots[better], now[now < best_cost[moving]]
    return _held(best, tables.experts)


def _newly_loaded(
    tables: _Tables, start: Bools, rows: Ints, one: tuple[Ints, Ints], two: tuple[Ints, Ints]
) -> Ints:
    """How many more slots would have to be loaded, counted from `start`, after a swap."""
    (a, i), (b, j) = one, two
    of_a, of_b = tables.slots[rows, a, i], tables.slots[rows, b, j]
    last = np.minimum(of_b, tables.experts - 1)  # an empty place is never loaded
    new = 2 - start[rows, a, last] - start[rows, b, of_a].astype(np.int64)
    old = 2 - start[rows, b, last] - start[rows, a, of_a].astype(np.int64)
    empty = of_b == tables.experts
    only_a = start[rows, a, of_a].astype(np.int64) - start[rows, b, of_a]
    return np.asarray(np.where(empty, only_a, new - old))


def _best_swap(tables: _Tables, rows: Ints) -> tuple[Ints, Ints, Ints, Ints, Floats]:
    """For each row: fullest server and column, partner and column, and their time after it."""
    site, every = tables.site, np.arange(len(rows))
    time = tables.load[rows] / site.rate
    a = time.argmax(1)
    far = np.where(site.node == site.node[a][:, None], time, np.inf)
    far[every, a] = np.inf
    near = np.argsort(far, axis=1, kind="stable")[:, :PARTNERS]  # [B, P]
    of_a = tables.slots[rows, a]  # [B, C]
    of_b = tables.slots[rows[:, None], near]  # [B, P, C]
    share = tables.share[rows]
    taken = share[every[:, None], of_a]
    given = share[every[:, None, None], of_b]
    shift = (taken[:, None, :, None] - given[:, :, None, :]).astype(np.float64)  # [B, P, C, C]
    rate_b = site.rate[near][:, :, None, None]
    after_b = (tables.load[rows[:, None], near][:, :, None, None] + shift) / rate_b
    load_a = tables.load[rows, a][:, None, None, None]
    after_a = (load_a - shift) / site.rate[a][:, None, None, None]
    peak = np.maximum(after_a, after_b)
    peak[~np.isfinite(far[every[:, None], near])] = np.inf
    # Neither may get what it holds already; an empty place counts while the server has room.
    held_b = tables.holds[rows[:, None, None], near[:, :, None], of_a[:, None, :]]  # [B, P, C]
    held_a = tables.holds[rows[:, None, None], a[:, None, None], of_b]
    full_b = (tables.used[rows[:, None], near] >= site.capacity[near])[:, :, None]
    closed_b = held_a | (full_b & (of_b == tables.experts))
    barred = held_b[:, :, :, None] | closed_b[:, :, None, :]
    barred |= (of_a == tables.experts)[:, None, :, None]
    peak[barred] = np.inf
    flat = peak.reshape(len(rows), -1)
    chosen = flat.argmin(1)
    partner, i, j = np.unravel_index(chosen, peak.shape[1:])
    return a, i, near[every, partner], j, flat[every, chosen]


def match_servers(holds: Bools, current: Bools, site: Site) -> Bools:
    """[L, S, E]: `holds` with interchangeable servers renamed to keep most of `current`.

    Servers of one node, rate and capacity are interchangeable; pairs that share most experts are
    matched first.
    """
    layers, servers, _ = holds.shape
    alike = (site.node[:, None] == site.node) & (site.rate[:, None] == site.rate)
    alike &= site.capacity[:, None] == site.capacity
    matched = np.empty_like(holds)
    for layer in range(layers):
        common = holds[layer].astype(np.float32) @ current[layer].astype(np.float32).T
        common[~alike] = -1
        new, old = np.nonzero(common > 0)
        order = np.argsort(-common[new, old], kind="stable")
        name = np.full(servers, -1)
        taken = np.zeros(servers, np.bool_)
        for n, o in zip(new[order].tolist(), old[order].tolist(), strict=True):
            if name[n] < 0 and not taken[o]:
                name[n], taken[o] = o, True
        for n in np.flatnonzero(name < 0):
            name[n] = int(np.argmax(alike[n] & ~taken))
            taken[name[n]] = True
        matched[layer, name] = holds[layer]
    return matched
