"""Which experts shall move now, because servers have unequally much to do. Pure.

Windows of counts go into an exponential average (`forecast`); the planner says what a better
placement would move and what that brings. Nothing moves

* below `max_violation`, or where too little has been counted to tell a skew from noise,
* in `pause_s` after a migration, so that it shows what it has brought first,
* while some expert is on no server that is ready: that is for people or the supervisor to mend,
* where the planner finds no move that is worth its loading (`least_gain` and the cost of moves):
  so the same load does not move experts back and forth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import numpy.typing as npt

from expertmesh.config import RebalanceConfig
from expertmesh.errors import ConfigError
from expertmesh.model import Slot
from load_controller.forecast import Forecast, observe
from load_controller.planner import Move, Placement, Server, plan_placement

Counts = npt.NDArray[np.int64]  # [E]


@dataclass(frozen=True, slots=True)
class Holder:
    """One server that is ready."""

    name: str
    node: str
    holds: Set[Slot]
    rate: float = 1.0  # relative to others


@dataclass(frozen=True, slots=True)
class Violation:
    """MaxVio over servers of one layer, of the average load."""

    now: float
    planned: float  # the same as `now` where nothing shall move


@dataclass(frozen=True, slots=True)
class Decision:
    """What shall move, and why."""

    reason: str  # in words, for people
    moves: tuple[Move, ...] = ()  # their `layer` is the index in the model
    layers: Mapping[int, Violation] = field(default_factory=dict)  # those that were planned


@dataclass(frozen=True, slots=True)
class View:
    """What one decision rests on; never changed, so that another thread may decide."""

    loads: Mapping[int, npt.NDArray[np.float64]]  # [E] by layer: what a window is expected to count
    moved_s: float | None  # since the last migration ended


class Rebalancer:
    """Keeps the average of what routers have counted."""

    def __init__(self, config: RebalanceConfig) -> None:
        self._config = config
        self._totals: dict[int, Counts] | None = None
        self._averages: dict[int, Forecast] = {}
        self._moved_at: float | None = None

    def observe(self, totals: Mapping[int, Counts]) -> None:
        """Takes a window's end: `totals` are each layer's assignments since ever. The first look
        only says where windows begin."""
        before = self._totals
        self._totals = dict(totals)
        if before is None:
            return
        for layer, total in totals.items():
            window = total - before.get(layer, np.zeros_like(total))
            known = self._averages.get(layer)
            # Sums that have forgotten nothing yet would be off by what came before a restart.
            if (window >= 0).all():
                self._averages[layer] = observe(known, window, self._config.half_life_windows)

    def moved(self, now: float) -> None:
        """A migration has ended, well or not."""
        self._moved_at = now

    def view(self, now: float) -> View:
        """What to decide by."""
        enough = self._config.least_assignments
        loads = {
            layer: average.load
            for layer, average in sorted(self._averages.items())
            if self._seen(average) >= enough
        }
        return View(loads, None if self._moved_at is None else now - self._moved_at)

    def _seen(self, average: Forecast) -> float:
        """Assignments that the average rests on: windows count by their weight in it."""
        keep = 0.5 ** (1.0 / self._config.half_life_windows)
        return float(average.sums.sum() / (1.0 - keep))


def decide(view: View, servers: Sequence[Holder], config: RebalanceConfig) -> Decision:
    """What shall move now between the servers that are ready."""
    if len(servers) < 2:
        return Decision(f"{len(servers)} servers are ready: nothing can move")
    if not view.loads:
        return Decision(f"no layer has {config.least_assignments} assignments yet")
    layers: dict[int, Violation] = {}
    moves: list[Move] = []
    for experts in sorted({len(load) for load in view.loads.values()}):
        indices = [layer for layer, load in view.loads.items() if len(load) == experts]
        current = _placement(servers, indices, experts)
        missing = ~current.holds.any(1)
        if missing.any():
            at, expert = np.argwhere(missing)[0].tolist()
            return Decision(f"expert {expert} of layer {indices[at]} is on no server that is ready")
        try:
            found, wanted = _plan(view, servers, indices, current, config)
        except ConfigError as error:
            return Decision(error.message)
        layers |= found
        moves += wanted
    worst = max(layers, key=lambda layer: layers[layer].now)
    said = f"MaxVio of servers is {layers[worst].now:.3f} in layer {worst}"
    still = {layer: Violation(each.now, each.now) for layer, each in layers.items()}
    if layers[worst].now <= config.max_violation:
        return Decision(f"{said}: up to {config.max_violation:g} nothing moves", (), still)
    if not moves:
        return Decision(f"{said}, but no move is worth its loading", (), still)
    if view.moved_s is not None and view.moved_s < config.pause_s:
        left_s = config.pause_s - view.moved_s
        return Decision(f"{said}; the last migration's pause lasts {left_s:.0f} s more", (), still)
    loads = sum(move.action == "load" for move in moves)
    planned = max(each.planned for each in layers.values())
    reason = f"{said}: {loads} slots to load make it {planned:.3f} at most"
    return Decision(reason, tuple(moves), layers)


def _plan(
    view: View, servers: Sequence[Holder], indices: Sequence[int], current: Placement,
    config: RebalanceConfig,
) -> tuple[dict[int, Violation], list[Move]]:  # fmt: skip
    """Layers of equally many experts. Raises ConfigError where the redundant slots do not fit."""
    experts = current.holds.shape[2]
    there = int(current.holds.sum((1, 2)).max()) - experts
    redundant = there if config.redundant is None else config.redundant
    share = ceil((experts + redundant) / len(servers))
    # Nothing is known of their free memory: no server gets more slots than it has or a fair share.
    sites = [
        Server(name=each.name, node=each.node, capacity=max(share, int(held)), rate=each.rate)
        for each, held in zip(servers, current.holds.sum(2).max(0), strict=True)
    ]
    load = np.array([view.loads[layer] for layer in indices], np.float64)
    plan = plan_placement(
        load, sites, redundant, current, weighted=False, least_gain=config.least_gain
    )
    assert plan.violation_before is not None
    layers = {
        layer: Violation(float(before), float(after))
        for layer, before, after in zip(
            indices, plan.violation_before, plan.violation_after, strict=True
        )
    }
    return layers, [move._replace(layer=indices[move.layer]) for move in plan.moves]


def _placement(servers: Sequence[Holder], indices: Sequence[int], experts: int) -> Placement:
    row_of = {layer: row for row, layer in enumerate(indices)}
    holds = np.zeros((len(indices), len(servers), experts), np.bool_)
    for at, server in enumerate(servers):
        for slot in server.holds:
            if slot.layer in row_of and slot.expert < experts:  # above: the shared expert
                holds[row_of[slot.layer], at, slot.expert] = True
    return Placement(tuple(server.name for server in servers), holds)
