"""Which servers to start, drain or end next, from those there are and the number wanted. Pure.

Nothing is remembered from one look to the next: what an earlier supervisor had begun is seen in the
actors that Ray has and in what servers say of themselves, and gone on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from expertmesh.config import AutoscaleConfig
from expertmesh.errors import MeshError, NoRoomError
from expertmesh.model import ModelSpec, Slot
from expertmesh.placement import initial_parts
from fleet.moves_away import Counts, Room, last_copies, moves_away
from load_controller.planner import Move

PREFIX = "auto-"  # of the names of servers that were added; those of the launch have others
#: A server that could not load is ended, and another asked for, no sooner than this after.
FAILED_S = 60.0
#: A server that drains for longer is ended.
DRAIN_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One server, by what Ray and the load controller say of it."""

    name: str
    state: str  # as announced; "asked" before
    node: str = ""
    holds: frozenset[Slot] = frozenset()
    rate: float = 1.0  # its speed relative to others
    is_ours: bool = True  # Ray has an actor for it: it can be ended, and comes back when it dies
    for_s: float = 0.0  # how long its state has been seen

    @property
    def is_running(self) -> bool:
        """Whether it answers requests."""
        return self.state == "ready"

    @property
    def is_starting(self) -> bool:
        """Whether it will. One that has failed counts, so that the next is asked for in time."""
        return self.is_ours and self.state in ("asked", "loading", "lost", "failed")

    @property
    def is_leaving(self) -> bool:
        """Whether it still ends requests. One that has ended is only remembered for a while."""
        return self.is_ours and self.state == "draining"


@dataclass(frozen=True, slots=True)
class Start:
    """Ask Ray for one more server."""

    name: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """Move the last copies of a server away, then drain it."""

    name: str
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class End:
    """End an actor that nobody needs any more."""

    name: str
    why: str


Step = Start | Drain | End


def bounded(config: AutoscaleConfig, least: int, most: int) -> AutoscaleConfig:
    """The configuration with bounds set by hand; 0 where nothing was."""
    if not least and not most:
        return config
    low = least or min(config.min_replicas, most)
    high = most or max(config.max_replicas, least)
    return replace(config, min_replicas=low, max_replicas=high)


def next_steps(
    members: Sequence[Member], replicas: int, plan: ServerPlan, counts: Counts
) -> tuple[Step, ...]:
    """What to do now. At most one server drains at a time.

    Raises NoRoomError where too many run, and none can go.
    """
    ends = [End(m.name, why) for m in members if (why := _is_over(m))]
    ended = {end.name for end in ends}
    left = [member for member in members if member.name not in ended]
    running = [member for member in left if member.is_running]
    starting = [member for member in left if member.is_starting]
    surplus = len(running) + len(starting) - replicas
    if surplus < 0:
        return (*ends, *_starts(left, -surplus, plan, counts))
    cancelled = _cancelled(starting, running)[:surplus]
    ends += [End(name, "fewer servers are wanted") for name in cancelled]
    if surplus > len(cancelled) and not any(member.is_leaving for member in left):
        return (*ends, _drain(running, plan.room, counts))
    return tuple(ends)


def _is_over(member: Member) -> str:
    """Why an actor shall be ended, empty when it shall not."""
    if member.is_ours and member.state == "failed" and member.for_s > FAILED_S:
        return "it could not load; another is asked for"
    if member.is_leaving and member.for_s > DRAIN_S:
        return "it has drained"
    return ""


def _cancelled(starting: Sequence[Member], running: Sequence[Member]) -> list[str]:
    """Servers that are not needed before they have started, the last one first. One that has
    been there, and held what nobody else does, is waited for."""
    there = frozenset().union(*(member.holds for member in running))
    spare = [m.name for m in starting if m.name.startswith(PREFIX) and m.holds <= there]
    return sorted(spare, key=_number, reverse=True)


def _drain(running: Sequence[Member], room: Room, counts: Counts) -> Drain:
    """The server that can go with the least to move: one of ours before one that somebody has
    started by hand, an added one before one of the launch's, and one that is alone on its node,
    which can then go, too."""
    holds = {member.name: member.holds for member in running}
    on_node = {m.name: sum(other.node == m.node for other in running) for m in running}

    def cost(member: Member) -> tuple[object, ...]:
        return (
            len(last_copies(member.name, holds)),
            not member.is_ours,
            not member.name.startswith(PREFIX),
            on_node[member.name],
            -_number(member.name),
        )

    why: MeshError = NoRoomError("no server is running that could go")
    for member in sorted(running, key=cost):
        try:
            return Drain(member.name, moves_away(member.name, holds, counts, room))
        except MeshError as error:
            why = error
    raise why


def _starts(members: Sequence[Member], count: int, plan: ServerPlan, counts: Counts) -> list[Start]:
    taken = [_number(member.name) for member in members]
    holds = [member.holds for member in members if member.state != "draining"]
    starts: list[Start] = []
    for number in range(max(taken, default=0) + 1, max(taken, default=0) + 1 + count):
        slots = plan.slots_for_one_more(holds, counts)
        holds.append(frozenset(slots))
        starts.append(Start(f"{PREFIX}{number}", slots))
    return starts


def _number(name: str) -> int:
    tail = name.removeprefix(PREFIX)
    return int(tail) if name.startswith(PREFIX) and tail.isdigit() else 0


class ServerPlan:
    """What a server of a cluster of `shards` parts is made for."""

    def __init__(self, spec: ModelSpec, shards: int) -> None:
        self._spec = spec
        parts = [frozenset(part) for part in initial_parts(spec, shards)]
        most = {layer.index: 0 for layer in spec.layers}
        for layer in spec.layers:
            most[layer.index] = max(
                sum(Slot(layer.index, e) in part for e in range(layer.num_experts))
                for part in parts
            )
        #: Routed experts of the layer that has most, and slots of a layer that a server takes.
        self.experts = max((layer.num_experts for layer in spec.layers), default=0) or 1
        self.slots = max(most.values(), default=0) or 1
        self._most = most
        self._everywhere = frozenset.intersection(*parts)
        self.room = Room.of(spec, self.slots)

    def slots_for_one_more(
        self, holds: Iterable[frozenset[Slot]], counts: Counts
    ) -> tuple[Slot, ...]:
        """What one more server shall hold: of each layer what nobody holds, then what does most a
        copy; shared experts and dense layers where all parts have them or nobody does."""
        copies: dict[Slot, int] = {}
        for slots in holds:
            for slot in slots:
                copies[slot] = copies.get(slot, 0) + 1
        chosen: list[Slot] = []
        for layer in self._spec.layers:
            routed = [Slot(layer.index, expert) for expert in range(layer.num_experts)]
            done = _shares(counts, layer.index, layer.num_experts)
            routed.sort(
                key=lambda slot: (
                    slot in copies,
                    -done[slot.expert] / max(1, copies.get(slot, 0)),
                    slot.expert,
                )
            )
            chosen += routed[: self._most[layer.index]]
            shared = Slot(layer.index, layer.num_experts)
            if layer.has_shared and (shared in self._everywhere or shared not in copies):
                chosen.append(shared)
        return tuple(sorted(chosen))


def _shares(counts: Counts, layer: int, experts: int) -> Mapping[int, float]:
    """Each expert's part of its layer's rows, and an even one: new clusters have counted little."""
    found = counts.get(layer)
    done = [0.0] * experts if found is None else [float(found[e]) for e in range(experts)]
    total = sum(done) or 1.0
    return {expert: done[expert] / total + 1 / experts for expert in range(experts)}
