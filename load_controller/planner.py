"""Which server should hold which experts: from windowed load to a placement. Pure; numpy only.

A plan is made for each layer by itself, since the layers of a model run one after the other:

1. *Copies.* Of `redundant` slots beyond one per expert, each goes to the expert with the largest
   load per copy.
2. *Packing.* Copies go, heaviest first, to the server that is least loaded for its rate and has
   room; never two of one expert to one server. Where the experts' groups divide evenly among the
   nodes, groups are packed onto nodes first, and copies stay on their group's node, so that
   group-limited routing crosses few nodes; else nodes do not matter. (The published greedy
   algorithm of DeepSeek's EPLB, `planner_pack`.)
3. *Search.* Copies of the fullest server are exchanged for lighter ones elsewhere
   (`planner_search`), and other numbers of copies are tried where a layer stays uneven
   (`planner_counts`).
4. *Weights.* An expert's rows are divided over its copies so that the largest time is least
   (`planner_spread`), unless routers divide evenly (`weighted`).
5. *Staying.* Where there is a current placement, a layer changes only if that lowers
   MaxVio + `move_cost` * slots to load / slots by more than `least_gain` (`planner_stay`).

MaxVio of servers = max_s(load_s / rate_s) / (sum load / sum rate) - 1; with equal rates that is
the (max - mean) / mean of arXiv 2408.15664, over servers instead of experts.

Shared experts and dense layers are not planned here: every token passes them, so their copies
follow the number of rows and not a skew, and the caller keeps a replica count for them.

Shapes: L planned layers, S servers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from expertmesh.errors import ConfigError
from expertmesh.placement import SlotMap
from load_controller.planner_pack import Bools, Floats, Ints, Site, quantise
from load_controller.planner_search import violation
from load_controller.planner_servers import Server, site_of
from load_controller.planner_spread import spread
from load_controller.planner_stay import Task, from_current, from_nothing

__all__ = ["Move", "Placement", "Plan", "Server", "plan_placement"]


@dataclass(frozen=True)
class Placement:
    """Which server holds which routed experts."""

    servers: tuple[str, ...]
    holds: Bools  # [L, S, E]

    @classmethod
    def of(cls, slot_map: SlotMap, layers: Sequence[int], experts: int) -> Placement:
        """The routed part of a slot map; `layers` are model layer indices with E experts each."""
        tables = [slot_map.holds[layer][:, :experts] for layer in layers]
        shape = (len(tables), len(slot_map.servers), experts)
        return cls(slot_map.servers, np.array(tables, np.bool_).reshape(shape))

    def on(self, servers: Sequence[str]) -> Bools:
        """[L, S, E] for other servers: gone ones are left out, new ones hold nothing."""
        layers, _, experts = self.holds.shape
        holds = np.zeros((layers, len(servers), experts), np.bool_)
        row_of = {name: row for row, name in enumerate(self.servers)}
        for row, name in enumerate(servers):
            if name in row_of:
                holds[:, row] = self.holds[:, row_of[name]]
        return holds

    def even_loads(self, load: npt.ArrayLike) -> Floats:
        """[L, S]: what each server carries of `load` [L, E] when copies share evenly."""
        share = np.asarray(load) / np.maximum(self.holds.sum(1), 1)
        return np.asarray((self.holds @ share[:, :, None])[:, :, 0])


class Move(NamedTuple):
    """A slot to load or to drop. A plan lists all loads first: a copy goes when others are up."""

    action: Literal["load", "drop"]
    layer: int  # row of the planned load, not the model's layer index
    expert: int
    server: str


@dataclass(frozen=True)
class Plan:
    """A placement, how to get there, and what it should bring."""

    placement: Placement
    weights: Floats  # [L, S, E], the part of an expert's rows that each copy gets; sums to 1 over S
    moves: tuple[Move, ...]
    loads_before: Floats | None  # [L, S], in units of the load; None without a current placement
    loads_after: Floats  # [L, S]
    violation_before: Floats | None  # [L], MaxVio over servers, both by best weights
    violation_after: Floats  # [L]


def plan_placement(
    load: npt.ArrayLike,
    servers: Sequence[Server],
    redundant: int,
    current: Placement | None = None,
    *,
    groups: int | None = None,
    move_cost: float = 0.1,
    least_gain: float = 0.01,
    weighted: bool = True,
) -> Plan:
    """Plans the routed experts of all layers.

    `load` [L, E] is what each expert is expected to get, in any unit; a layer of zeros counts as
    even, and keeps a current placement that can stay. `redundant` slots a layer may be used
    beyond one per expert. `groups` is the number of equal runs that the model's experts are
    chosen in (GateSpec.n_group). `move_cost` is the MaxVio that loading every slot of a layer anew
    must gain; `least_gain` the MaxVio that any change of a layer must gain beyond its moves.
    `weighted` says that routers follow the plan's weights; without, they divide an expert's rows
    evenly over its copies, and the plan is the best found for that.

    A current placement that cannot stay (an expert lost, a capacity, node or budget exceeded) is
    mended, whatever that costs. Raises ConfigError where the slots do not fit.
    """
    wanted = _checked_load(load)
    units = quantise(wanted)
    site, slots = site_of(wanted, servers, redundant, groups)
    site = replace(site, weighted=weighted)
    counted = wanted.sum(1) > 0
    price = move_cost / int(slots.sum())
    task = Task(units, counted, site, slots, price, least_gain)
    names = tuple(server.name for server in servers)
    if current is None:
        before, holds = None, from_nothing(task)
    else:
        before = _checked_current(current, wanted.shape).on(names)
        holds = from_current(task, before)
    return _plan(wanted, units, names, site, before, holds)


def _plan(
    load: Floats, units: Ints, names: tuple[str, ...], site: Site, before: Bools | None,
    holds: Bools,
) -> Plan:  # fmt: skip
    weights = _weights(units, holds, site)
    loads_after = (weights * load[:, None, :]).sum(2)
    loads_before = violation_before = None
    if before is not None:
        loads_before = (_weights(units, before, site) * load[:, None, :]).sum(2)
        violation_before = violation(loads_before, site.rate)
    return Plan(
        Placement(names, holds),
        weights,
        _moves(names, np.zeros_like(holds) if before is None else before, holds),
        loads_before,
        loads_after,
        violation_before,
        violation(loads_after, site.rate),
    )


def _weights(units: Ints, holds: Bools, site: Site) -> Floats:
    """[L, S, E]: the part of an expert's rows that each copy gets."""
    amount = spread(np.maximum(units, 1), holds, site)
    # About the expert's units, if a little less; 0 where nobody holds it.
    total = amount.sum(1, keepdims=True)
    return np.asarray(amount / np.where(total > 0, total, 1.0))


def _moves(names: tuple[str, ...], before: Bools, after: Bools) -> tuple[Move, ...]:
    """What to load, then what to drop, layer by layer."""
    moves: list[Move] = []
    action: Literal["load", "drop"]
    for action, changed in (("load", after & ~before), ("drop", before & ~after)):
        # Three flat lists: a list of each place would be thousands for the garbage collector.
        places = (axis.tolist() for axis in changed.nonzero())
        moves += [
            Move(action, layer, expert, names[server])
            for layer, server, expert in zip(*places, strict=True)
        ]
    return tuple(moves)


def _checked_load(load: npt.ArrayLike) -> Floats:
    wanted = np.asarray(load, np.float64)
    if wanted.ndim != 2 or 0 in wanted.shape:
        raise ConfigError(f"load has shape {wanted.shape}, expected [layers, experts]")
    if not (np.isfinite(wanted).all() and (wanted >= 0).all()):
        raise ConfigError("load holds a negative or non-finite number")
    return wanted


def _checked_current(current: Placement, shape: tuple[int, ...]) -> Placement:
    layers, _, experts = current.holds.shape
    if (layers, experts) != shape:
        raise ConfigError(
            f"the current placement has {layers} layers of {experts} experts, the load {shape[0]} "
            f"of {shape[1]}: pass both for the same layers"
        )
    return current
