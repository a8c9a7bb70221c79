"""From a current placement to a better one in few moves. Pure; numpy only.

For each layer three placements compete: the current one; the current one with copies given and
taken as the load asks, then improved by swaps; and the one planned from nothing, its servers
renamed to keep most. The least of

    J = MaxVio + price * slots to load + (least gain, unless the layer stays)

wins, and the layer is judged again from there, until it stays. As MaxVio falls with every change,
that ends, and to plan again from the outcome with the same load moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from load_controller.planner_counts import repack
from load_controller.planner_pack import Bools, Floats, Ints, Site, copy_hottest, pack, sum_shares
from load_controller.planner_search import Cost, improve, match_servers, violation
from load_controller.planner_spread import spread

#: More rounds than any layer was seen to need (two or three).
ROUNDS = 16


@dataclass(frozen=True)
class Task:
    """What to place, where, and what a change must gain."""

    units: Ints  # [L, E]
    counted: Bools  # [L], False for a layer without load: nothing is gained by moving it
    site: Site
    slots: Ints  # [nodes], of one layer
    price: float  # of one loaded slot, in units of MaxVio
    least_gain: float  # in units of MaxVio

    def rows(self, layers: Ints) -> Task:
        """The same task for some of the layers."""
        return replace(
            self,
            units=self.units[layers],
            counted=self.counted[layers],
            site=self.site.rows(layers),
        )

    def violation(self, holds: Bools) -> Floats:
        """[L]: MaxVio over servers with rows divided as well as the placement allows."""
        carried = spread(self.units, holds, self.site).sum(2)
        return np.asarray(np.where(self.counted, violation(carried, self.site.rate), 0.0))


def from_nothing(task: Task) -> Bools:
    """[L, S, E]: the best placement found without regard to a current one."""
    copies = copy_hottest(task.units, task.site, task.slots)
    empty = np.zeros((len(copies), len(task.site.rate), copies.shape[1]), np.bool_)
    packed = pack(task.units, copies, empty, task.site)
    packed = improve(task.units, packed, task.site, Cost(packed, 0.0))
    return repack(task.units, copies, packed, task.site)[1]


def from_current(task: Task, current: Bools) -> Bools:
    """[L, S, E]: the placement that is reached from `current`."""
    fresh = from_nothing(task)
    holds = current.copy()
    moving = np.arange(len(holds))
    for _ in range(ROUNDS):
        here = holds[moving]
        there = _step(task.rows(moving), here, fresh[moving])
        holds[moving] = there
        moving = moving[(here != there).any((1, 2))]
        if not len(moving):
            break
    return holds


def _step(task: Task, start: Bools, fresh: Bools) -> Bools:
    """[L, S, E]: for each layer the cheapest of staying, mending and planning from nothing."""
    there = replace(task, site=replace(task.site, home=_home(task.site, start)))
    greedy = copy_hottest(task.units, there.site, task.slots)
    at_home = (there.site.home == task.site.home).all(1, keepdims=True)
    copies = np.where(at_home, fresh.sum(1), greedy)
    mended = pack(task.units, copies, _keep(there, copies, start), there.site)
    mended = improve(task.units, mended, there.site, Cost(start, task.price))
    renamed = match_servers(fresh, start, task.site)
    costs = [np.where(_is_whole(there, start), task.violation(start), np.inf)]
    for planned in (mended, renamed):
        loads = (planned & ~start).sum((1, 2))
        costs.append(task.violation(planned) + task.price * loads + task.least_gain)
    choice = np.argmin(costs, axis=0)
    return np.asarray(np.stack([start, mended, renamed])[choice, np.arange(len(start))])


def _home(site: Site, holds: Bools) -> Ints:
    """[L, E]: where most copies of an expert's group are now, if that is an even division of the
    experts over the nodes; the home that was planned otherwise."""
    nodes = int(site.node.max()) + 1
    per_node = np.stack([holds[:, site.node == n].sum(1) for n in range(nodes)], 1)  # [L, N, E]
    home = site.home.copy()
    layers, _, experts = holds.shape
    votes = per_node.reshape(layers, nodes, experts // site.run, site.run).sum(3)
    for layer, chosen in enumerate(np.repeat(votes.argmax(1), site.run, axis=1)):
        if (np.bincount(chosen) == experts // nodes).all():
            home[layer] = chosen
    return home


def _is_whole(task: Task, holds: Bools) -> Bools:
    """[L]: every expert is there, and no server, node or budget is exceeded."""
    site = task.site
    fits = np.asarray(holds.sum(2) <= site.capacity)
    whole = np.asarray(np.any(holds, 1)).all(axis=-1) & fits.all(axis=-1)
    whole &= ~(holds & ~site.may_hold()).any((1, 2))
    for node, slots in enumerate(task.slots):
        whole &= np.asarray(holds[:, site.node == node].sum((1, 2)) <= slots)
    return np.asarray(whole)


def _keep(task: Task, copies: Ints, start: Bools) -> Bools:
    """[L, S, E]: `start` without what may not stay: copies off their node, over a server's
    capacity (those of which there are most, then the lightest), and surplus ones (from the
    fullest servers)."""
    kept = start & task.site.may_hold()
    share = task.units // copies
    for layer, server in np.argwhere(kept.sum(2) > task.site.capacity):
        held = np.flatnonzero(kept[layer, server])
        order = np.lexsort((share[layer, held], -kept[layer][:, held].sum(0)))
        excess = len(held) - task.site.capacity[server]
        kept[layer, server, held[order[:excess]]] = False
    load = sum_shares(share, kept)
    surplus = kept.sum(1) - copies
    for layer, expert in np.argwhere(surplus > 0):
        for _ in range(surplus[layer, expert]):
            time = np.where(kept[layer, :, expert], load[layer] / task.site.rate, -1.0)
            fullest = time.argmax()
            kept[layer, fullest, expert] = False
            load[layer, fullest] -= share[layer, expert]
    return kept
