"""Greedy replication and packing, for all layers at once. Pure; numpy only.

The scheme is the one DeepSeek published with EPLB (notes on `rebalance_experts`, 2025): copy the
expert with the largest load per copy, then put the copies, heaviest first, onto the least loaded
server that has room. Two things are added: a server never gets two copies of one expert, and a
server's load is divided by its rate.

Shapes: L layers, S servers, E routed experts. Loads are integers (`quantise`), so that sums are
exact and the same placement has the same load whichever way a search has come to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: A layer's loads add up to about this many units: fine enough that rounding moves a server's
#: share by less than 1e-9, coarse enough that sums stay exact in float64, too.
UNITS = 2**40


@dataclass(frozen=True)
class Site:
    """The servers as arrays, and what each may hold."""

    rate: Floats  # [S], larger is faster; only ratios matter
    capacity: Ints  # [S], most slots of one layer
    node: Ints  # [S], all zero where nodes do not matter
    home: Ints  # [L, E], the only node that may hold this expert; all zero where any may
    run: int  # so many experts in a row share a home: a group's, or all
    weighted: bool = True  # routers divide an expert's rows by weight; else evenly

    def may_hold(self, layers: Ints | slice = slice(None)) -> Bools:
        """[L, S, E]: whether the server is on the expert's home node."""
        return np.asarray(self.home[layers][:, None, :] == self.node[:, None])

    def rows(self, layers: Ints) -> Site:
        """The same servers, for some of the layers."""
        return replace(self, home=self.home[layers])


def quantise(load: Floats) -> Ints:
    """[L, E] loads in units of 1 / UNITS of the layer; a layer without load counts as even."""
    known = load.sum(1, keepdims=True)
    even = np.where(known > 0, load, 1.0)
    # By the largest first: sums of huge or tiny loads neither overflow nor vanish.
    even = even / even.max(1, keepdims=True)
    return np.asarray(np.rint(even / even.sum(1, keepdims=True) * UNITS), np.int64)


def server_loads(units: Ints, holds: Bools) -> Ints:
    """[L, S]: what each server carries when an expert's rows spread evenly over its copies."""
    return sum_shares(units // np.maximum(holds.sum(1), 1), holds)


def sum_shares(share: Ints, holds: Bools) -> Ints:
    """[L, S]: the sum of the shares [L, E] of the experts that each server holds."""
    exact = holds.astype(np.float64) @ share.astype(np.float64)[:, :, None]
    return np.asarray(exact[:, :, 0], np.int64)


def pack_groups(load: Floats, groups: int, node_rate: Floats) -> Ints:
    """[L, E]: the node of each expert. Groups go, heaviest first, to the least loaded node.

    Experts `g * E / groups` onwards form group g; each node takes `groups / nodes` of them.
    """
    layers, experts = load.shape
    nodes = len(node_rate)
    weight = load.reshape(layers, groups, experts // groups).sum(2)
    order = np.argsort(-weight, axis=1, kind="stable")
    node_of_group = np.zeros((layers, groups), np.int64)
    carried, used = np.zeros((2, layers, nodes))
    every = np.arange(layers)
    for group in order.T:
        time = (carried + weight[every, group, None]) / node_rate
        chosen = np.where(used < groups // nodes, time, np.inf).argmin(1)
        node_of_group[every, group] = chosen
        carried[every, chosen] += weight[every, group]
        used[every, chosen] += 1
    return np.repeat(node_of_group, experts // groups, axis=1)


def copy_hottest(units: Ints, site: Site, slots: Ints) -> Ints:
    """[L, E]: how many copies each expert gets, when node n has `slots[n]` slots of a layer.

    Each copy goes to the expert with the largest load per copy; none gets more than there are
    servers to hold it.
    """
    layers = len(units)
    copies = np.ones_like(units)
    every = np.arange(layers)
    for node, total in enumerate(slots):
        at_home = site.home == node
        most = int((site.node == node).sum())
        spare = total - at_home.sum(1)
        for step in range(int(spare.max())):
            per_copy = np.where(at_home & (copies < most), units / copies, -1.0)
            hottest = per_copy.argmax(1)
            copies[every, hottest] += (step < spare) & (per_copy[every, hottest] >= 0)
    return copies


def pack(units: Ints, copies: Ints, holds: Bools, site: Site) -> Bools:
    """[L, S, E]: `holds` with copies added until every expert has `copies` of them.

    Heaviest first, onto the server that is then least loaded for its rate, among those that have
    room, do not hold the expert and are on its node. Where the room left is only on servers that
    hold the expert, another expert makes room; where that cannot be (capacities very unequal),
    the copy is left out. First copies are never left out.
    """
    holds = holds.copy()
    share = units // copies
    load, used = sum_shares(share, holds), holds.sum(2)
    allowed = site.may_hold()
    every = np.arange(len(units))
    for expert in _queue(share, copies - holds.sum(1)).T:
        wanted = expert >= 0
        at = np.maximum(expert, 0)
        weight = share[every, at]
        free = allowed[every, :, at] & ~holds[every, :, at]
        open_ = free & (used < site.capacity)
        time = np.where(open_, (load + weight[:, None]) / site.rate, np.inf)
        chosen = time.argmin(1)
        for layer in np.flatnonzero(wanted & ~open_.any(1)):
            _make_room(holds[layer], load[layer], share[layer], int(at[layer]), used[layer],
                       site.rows(np.array([layer])))  # fmt: skip
        put = np.flatnonzero(wanted & open_.any(1))
        holds[put, chosen[put], at[put]] = True
        load[put, chosen[put]] += weight[put]
        used[put, chosen[put]] += 1
    return holds


def _queue(share: Ints, need: Ints) -> Ints:
    """[L, n]: each layer's wanted copies, heaviest first; -1 where it has fewer than n."""
    need = np.maximum(need, 0)
    order = np.argsort(-share, axis=1, kind="stable")
    length = int(need.sum(1).max())
    queue = np.full((len(need), length), -1)
    for layer, experts in enumerate(order):
        items = np.repeat(experts, need[layer, experts])
        queue[layer, : len(items)] = items
    return queue


def _make_room(holds: Bools, load: Ints, share: Ints, expert: int, used: Ints, site: Site) -> None:
    """Puts `expert` on a full server, one of whose experts moves to a server with room."""
    allowed = site.may_hold()[0]  # [S, E]
    best: tuple[float, int, int, int] | None = None
    for roomy in np.flatnonzero(used < site.capacity):
        for full in np.flatnonzero(allowed[:, expert] & ~holds[:, expert]):
            for other in np.flatnonzero(holds[full] & ~holds[roomy] & allowed[roomy]):
                peak = max(
                    (load[full] + share[expert] - share[other]) / site.rate[full],
                    (load[roomy] + share[other]) / site.rate[roomy],
                )
                if best is None or peak < best[0]:
                    best = (peak, int(roomy), int(full), int(other))
    if best is None:
        return
    _, to, at, out = best
    holds[at, out], holds[at, expert], holds[to, out] = False, True, True
    load[at] += share[expert] - share[out]
    load[to] += share[out]
    used[to] += 1
