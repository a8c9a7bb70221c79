"""What has to move so that a server may go: no expert loses its last copy. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertmesh.errors import NoRoomError, UnavailableError
from expertmesh.model import ModelSpec, Slot
from load_controller.planner import Move

Counts = Mapping[int, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Room:
    """What one server may hold."""

    experts: Mapping[int, int]  # routed experts of each layer, by index; 0 for a dense one
    slots: int | None  # routed slots of one layer; None: as memory allows, which servers check

    @classmethod
    def of(cls, spec: ModelSpec, slots: int | None) -> Room:
        """For that model."""
        return cls({layer.index: layer.num_experts for layer in spec.layers}, slots)

    def is_routed(self, slot: Slot) -> bool:
        """Whether it is a routed expert: shared ones and dense layers take no slot's room."""
        return slot.expert < self.experts.get(slot.layer, 0)


def last_copies(server: str, holds: Mapping[str, Set[Slot]]) -> frozenset[Slot]:
    """What only this server holds."""
    others: frozenset[Slot] = frozenset().union(
        *(slots for name, slots in holds.items() if name != server)
    )
    return frozenset(holds[server]) - others


def moves_away(
    server: str, holds: Mapping[str, Set[Slot]], counts: Counts, room: Room
) -> tuple[Move, ...]:
    """Loads, then drops, after which the others hold every expert.

    `holds` is what the servers that are ready hold. The experts that did most (`counts` [E] by
    layer) choose first, the server that does least and has room. One that is full gives up an
    expert that another holds, too. Raises NoRoomError where that does not suffice, and
    UnavailableError where nobody else is ready.
    """
    others = {name: set(slots) for name, slots in holds.items() if name != server}
    if not others:
        raise UnavailableError(f"no server but {server} is ready: nobody could take its experts")
    moves: list[Move] = []
    sole = last_copies(server, holds)
    for slot in sorted(sole, key=lambda slot: (-_done(slot, counts), slot)):
        target, dropped = _target(slot, others, counts, room)
        if target is None:
            raise NoRoomError(
                f"expert {slot.expert} of layer {slot.layer} is only on {server}, and no other "
                f"server has room for it: each takes {room.slots} of a layer. Add a server first"
            )
        moves.append(Move("load", slot.layer, slot.expert, target))
        others[target].add(slot)
        if dropped is not None:
            moves.append(Move("drop", dropped.layer, dropped.expert, target))
            others[target].remove(dropped)
    return tuple(sorted(moves, key=lambda move: move.action == "drop"))


def _target(
    slot: Slot, others: Mapping[str, Set[Slot]], counts: Counts, room: Room
) -> tuple[str | None, Slot | None]:
    """Who takes a slot, and what it gives up for it."""
    copies: dict[Slot, int] = {}
    for slots in others.values():
        for each in slots:
            copies[each] = copies.get(each, 0) + 1

    def work(name: str) -> tuple[float, str]:
        mine = [each for each in others[name] if each.layer == slot.layer]
        return sum(_done(each, counts) / copies[each] for each in mine), name

    by_work = sorted(others, key=work)
    if room.slots is None or not room.is_routed(slot):
        return by_work[0], None
    held = {
        name: [s for s in slots if s.layer == slot.layer and room.is_routed(s)]
        for name, slots in others.items()
    }
    for name in by_work:
        if len(held[name]) < room.slots:
            return name, None
    spare = [
        (_done(each, counts) / copies[each], each, name)
        for name, slots in held.items()
        for each in slots
        if copies[each] > 1
    ]
    if not spare:
        return None, None
    _, dropped, name = min(spare)
    return name, dropped


def _done(slot: Slot, counts: Counts) -> float:
    of_layer = counts.get(slot.layer)
    return (
        float(of_layer[slot.expert])
        if of_layer is not None and slot.expert < len(of_layer)
        else 0.0
    )
