"""What the planner would change in a surveyed cluster, and why. Decides; changes nothing.

Routers divide an expert's rows about evenly over its copies, so loads before and after are taken
for even division. Servers are taken to be equally fast. No server gets more slots of a layer than
it has now or than an even share: nothing is known of its free memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from expertmesh.errors import ConfigError
from fleet.survey import Survey, SurveyedServer
from load_controller.planner import Move, Placement, Plan, Server, plan_placement


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerProposal:
    """What would change in one layer."""

    layer: int  # index in the model
    maxvio_before: float  # of servers; infinite where an expert is on no server
    maxvio_after: float
    busiest: str  # the server that has most to do now
    hottest: tuple[tuple[int, float], ...]  # its experts that bring most, as parts of its load
    moves: tuple[Move, ...]  # their `layer` is the index in the model

    @property
    def loads(self) -> int:
        """Slots to load."""
        return sum(move.action == "load" for move in self.moves)

    @property
    def drops(self) -> int:
        """Slots to drop."""
        return len(self.moves) - self.loads


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """What would change in a cluster."""

    layers: tuple[LayerProposal, ...]
    redundant: int  # slots of a layer beyond one an expert that were allowed
    load_bytes: float  # of the checkpoint, about: by the mean slot of each server's
    counted: int  # assignments that the plan rests on
    without: tuple[str, ...]  # servers that are not ready, planned as if they were gone


def propose(survey: Survey, redundant: int | None = None) -> Proposal:
    """Plans the routed experts of a cluster from what it has counted.

    `redundant` slots of each layer may be used beyond one an expert; None: as many as there are.
    Raises ConfigError where no server is ready, or the slots do not fit.
    """
    ready = [server for server in survey.servers if server.state == "ready"]
    if not ready:
        raise ConfigError("no expert server is ready: there is nothing to plan for")
    kinds = sorted({each.num_experts for each in survey.info.layers if each.kind == "moe"})
    if not kinds:
        raise ConfigError("this model has no MoE layer: every server can do all of its work")
    layers: list[LayerProposal] = []
    most = 0
    for experts in kinds:
        indices = [each.index for each in survey.info.layers if each.num_experts == experts]
        current = _placement(ready, indices, experts)
        there = int(current.holds.sum((1, 2)).max()) - experts
        allowed = max(0, there) if redundant is None else redundant
        most = max(most, allowed)
        load = np.array([survey.counts.get(i, np.zeros(experts)) for i in indices], np.float64)
        servers = _servers(ready, current, experts + allowed)
        plan = plan_placement(load, servers, allowed, current, weighted=False)
        layers += _layers(indices, load, current, plan)
    size = {server.name: server.slot_bytes for server in ready}
    return Proposal(
        layers=tuple(sorted(layers, key=lambda each: each.layer)),
        redundant=most,
        load_bytes=sum(size[m.server] for e in layers for m in e.moves if m.action == "load"),
        counted=int(sum(counts.sum() for counts in survey.counts.values())),
        without=tuple(server.name for server in survey.servers if server.state != "ready"),
    )


def _placement(ready: Sequence[SurveyedServer], indices: Sequence[int], experts: int) -> Placement:
    holds = np.zeros((len(indices), len(ready), experts), np.bool_)
    for row, server in enumerate(ready):
        for at, layer in enumerate(indices):
            held = [expert for expert in server.holds.get(layer, ()) if expert < experts]
            holds[at, row, held] = True
    return Placement(tuple(server.name for server in ready), holds)


def _servers(ready: Sequence[SurveyedServer], current: Placement, slots: int) -> list[Server]:
    share = ceil(slots / len(ready))
    held = current.holds.sum(2).max(0)
    return [
        Server(name=server.name, node=server.node, capacity=max(share, int(now)), rate=server.rate)
        for server, now in zip(ready, held, strict=True)
    ]


def _layers(
    indices: Sequence[int], load: npt.NDArray[np.float64], current: Placement, plan: Plan
) -> list[LayerProposal]:
    assert plan.violation_before is not None
    per_copy = load / np.maximum(current.holds.sum(1), 1)
    shares = current.holds * np.where(load.sum(1) > 0, 1.0, 0.0)[:, None, None]
    carried = shares * per_copy[:, None, :]  # [L, S, E]
    moves: dict[int, list[Move]] = {index: [] for index in indices}
    for move in plan.moves:
        moves[indices[move.layer]].append(move._replace(layer=indices[move.layer]))
    found = []
    for at, index in enumerate(indices):
        lost = not current.holds[at].any(0).all()
        busiest = int(carried[at].sum(1).argmax())
        mine = carried[at, busiest]
        hottest = [e for e in np.argsort(-mine, kind="stable")[:3].tolist() if mine[e] > 0]
        found.append(
            LayerProposal(
                layer=index,
                maxvio_before=float("inf") if lost else float(plan.violation_before[at]),
                maxvio_after=float(plan.violation_after[at]),
                busiest=current.servers[busiest] if mine.sum() > 0 else "",
                hottest=tuple((e, float(mine[e] / mine.sum())) for e in hottest),
                moves=tuple(moves[index]),
            )
        )
    return found
