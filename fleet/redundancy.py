"""As many copies beyond one an expert as the autoscaler wants: what to load or drop. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np

from expertmesh.model import Slot
from fleet.moves_away import Counts, Room
from load_controller.planner import Move, Placement, Server, plan_placement


def redundant_slots(holds: Mapping[str, Set[Slot]], room: Room) -> int:
    """Slots beyond one an expert, of the layer that has most."""
    routed: dict[int, list[Slot]] = {layer: [] for layer in room.experts}
    for slots in holds.values():
        for slot in slots:
            if room.is_routed(slot):
                routed[slot.layer].append(slot)
    return max((len(slots) - len(set(slots)) for slots in routed.values()), default=0)


def moves_to_have(
    redundant: int, holds: Mapping[str, Set[Slot]], nodes: Mapping[str, str], counts: Counts,
    room: Room, rates: Mapping[str, float] | None = None,
) -> tuple[Move, ...]:  # fmt: skip
    """Moves after which each layer has at most `redundant` slots beyond one an expert.

    `rates` are speeds of servers relative to each other, 1 where none is given. Raises
    ConfigError where that many slots do not fit the servers of `holds`.
    """
    moves: list[Move] = []
    names = tuple(sorted(holds))
    for experts in sorted({count for count in room.experts.values() if count}):
        layers = [layer for layer, count in sorted(room.experts.items()) if count == experts]
        current = Placement(names, _table(names, layers, experts, holds))
        servers = [
            Server(
                name=name,
                node=nodes.get(name, ""),
                capacity=room.slots,
                rate=(rates or {}).get(name, 1.0),
            )
            for name in names
        ]
        load = np.array(
            [counts.get(layer, np.zeros(experts))[:experts] for layer in layers], np.float64
        )
        plan = plan_placement(load, servers, redundant, current, weighted=False)
        moves += [move._replace(layer=layers[move.layer]) for move in plan.moves]
    return tuple(sorted(moves, key=lambda move: (move.layer, move.action == "drop")))


def _table(
    names: Sequence[str], layers: Sequence[int], experts: int, holds: Mapping[str, Set[Slot]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    held = np.zeros((len(layers), len(names), experts), np.bool_)
    for at, layer in enumerate(layers):
        for row, name in enumerate(names):
            mine = [slot.expert for slot in holds[name] if slot.layer == layer]
            held[at, row, [expert for expert in mine if expert < experts]] = True
    return held
