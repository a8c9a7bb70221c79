"""Slots on the wire: message `LayerSlots` of expert.proto."""

from __future__ import annotations

from collections.abc import Iterable

from expertmesh.model import Slot
from expertmesh.placement import group_by_layer
from expertmesh.v1 import expert_pb2


def layer_slots(slots: Iterable[Slot]) -> list[expert_pb2.LayerSlots]:
    """Slots as they travel: by layer and expert, ascending."""
    return [
        expert_pb2.LayerSlots(layer=layer, experts=experts)
        for layer, experts in group_by_layer(tuple(slots)).items()
    ]


def slots_of(layers: Iterable[expert_pb2.LayerSlots]) -> list[Slot]:
    """The slots of a message, in its order."""
    return [Slot(entry.layer, expert) for entry in layers for expert in entry.experts]
