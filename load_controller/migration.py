"""How experts move: which moves are possible, and in which steps. Pure.

A step moves the experts of one layer: copies are loaded beside the old ones, then routers are shown
the new placement, then old copies go. Layers follow each other, so that no more than one layer's
slots are there twice at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

from expertmesh.errors import InvalidRequestError, MismatchError
from expertmesh.model import Slot


class Copy(NamedTuple):
    """One slot on one server."""

    server: str
    slot: Slot


@dataclass(frozen=True)
class Step:
    """What happens to one layer."""

    layer: int
    loads: tuple[Copy, ...]
    drops: tuple[Copy, ...]


def plan_steps(
    shown: Mapping[str, Set[Slot]], loads: Iterable[Copy], drops: Iterable[Copy]
) -> list[Step]:
    """The steps, by ascending layer; what is so already is left out.

    `shown` says what the servers that can be asked hold now. Raises InvalidRequestError for a
    server that is not among them, an expert that nobody holds, a copy that is both loaded and
    dropped, and moves that would leave an expert without a copy.
    """
    loads, drops = frozenset(loads), frozenset(drops)
    known = frozenset().union(*shown.values()) if shown else frozenset()
    for copy in sorted(loads | drops):
        if copy.server not in shown:
            raise InvalidRequestError(
                f"server {copy.server!r} is not ready: name one of {', '.join(sorted(shown))}",
                field="moves",
            )
        if copy.slot not in known:
            raise InvalidRequestError(
                f"no server holds expert {copy.slot.expert} of layer {copy.slot.layer}: it is no "
                "expert of this model, or its server is away",
                field="moves",
            )
    if both := loads & drops:
        copy = min(both)
        raise InvalidRequestError(
            f"expert {copy.slot.expert} of layer {copy.slot.layer} is to be loaded and dropped on "
            f"{copy.server}",
            field="moves",
        )
    copies = {Copy(server, slot) for server, slots in shown.items() for slot in slots}
    left = {copy.slot for copy in (copies | loads) - drops}
    if lost := known - left:
        slot = min(lost)
        raise InvalidRequestError(
            f"the moves leave expert {slot.expert} of layer {slot.layer} without a server",
            field="moves",
        )
    loads, drops = loads - copies, drops & copies
    return [
        Step(layer, _of(loads, layer), _of(drops, layer))
        for layer in sorted({copy.slot.layer for copy in loads | drops})
    ]


def by_server(copies: Iterable[Copy]) -> dict[str, list[Slot]]:
    """The slots of each server, ascending."""
    grouped: dict[str, list[Slot]] = {}
    for server, slot in sorted(copies):
        grouped.setdefault(server, []).append(slot)
    return grouped


def check_digests(loaded: Mapping[Copy, str], elsewhere: Mapping[Slot, Mapping[str, str]]) -> None:
    """Raises MismatchError when a loaded copy differs from the same slot `elsewhere` (by server).

    A server that rounds weights to another dtype, or reads other files, is found here and not in
    wrong answers.
    """
    for (server, slot), digest in sorted(loaded.items()):
        for other, theirs in sorted(elsewhere.get(slot, {}).items()):
            if other != server and theirs != digest:
                raise MismatchError(
                    f"expert {slot.expert} of layer {slot.layer} has digest {digest[:12]} on "
                    f"{server} and {theirs[:12]} on {other}: start every server from the same "
                    "files, with the same dtype"
                )


def _of(copies: Iterable[Copy], layer: int) -> tuple[Copy, ...]:
    return tuple(sorted(copy for copy in copies if copy.slot.layer == layer))
