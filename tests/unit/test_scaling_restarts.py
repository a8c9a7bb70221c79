"""A supervisor that is killed between any two effects, over and over, still gets there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from expertmesh.errors import MeshError
from expertmesh.model import Slot
from expertmesh.placement import initial_parts
from fleet.scaling import Drain, End, Member, ServerPlan, Start, Step, next_steps
from tests.unit.test_scaling import _COUNTS, _MODEL

_PLAN = ServerPlan(_MODEL, 2)
_ALL = frozenset(slot for layer in _MODEL.layers for slot in layer.slots())


class World:
    """Servers that start, fail and drain in their own time; every effect happens or does not."""

    def __init__(self, draw: np.random.Generator) -> None:
        self._draw = draw
        self._slots: dict[str, frozenset[Slot]] = {}  # what servers were started with
        self.members = {
            f"shard{i}-replica0": Member(
                name=f"shard{i}-replica0", state="ready", node=f"n{i}", holds=frozenset(part)
            )
            for i, part in enumerate(initial_parts(_MODEL, 2))
        }

    def do(self, step: Step) -> None:
        """One effect."""
        match step:
            case Start(name, slots):
                new = Member(name=name, state="asked", node=name)
                self.members.setdefault(name, new)
                self._slots[name] = frozenset(slots)
            case End(name, _):
                del self.members[name]
            case Drain(name, moves):
                for move in moves:
                    self._move(move.server, move.action, Slot(move.layer, move.expert))
                self.members[name] = replace(self.members[name], state="draining")

    def _move(self, server: str, action: str, slot: Slot) -> None:
        member = self.members[server]
        held = member.holds | {slot} if action == "load" else member.holds - {slot}
        self.members[server] = replace(member, holds=held)

    def pass_time(self) -> None:
        """Some servers that start are a step further; those that drain may have gone."""
        for name, member in list(self.members.items()):
            if self._draw.random() < 0.5:
                continue
            if member.state == "asked":
                self.members[name] = replace(member, state="loading", holds=self._slots[name])
            elif member.state == "loading":
                state = "ready" if self._draw.random() < 0.9 else "failed"
                self.members[name] = replace(member, state=state)
            elif member.state == "failed":
                self.members[name] = replace(member, for_s=1000.0)
            elif member.state == "draining":
                del self.members[name]

    @property
    def served(self) -> frozenset[Slot]:
        """What somebody can be asked for."""
        return frozenset().union(*(m.holds for m in self.members.values() if m.is_running))


def _run(world: World, replicas: int, draw: np.random.Generator) -> int:
    """Turns, each cut off after any number of effects; how many it took to get there."""
    for turn in range(500):
        try:
            steps = next_steps(list(world.members.values()), replicas, _PLAN, _COUNTS)
        except MeshError:
            steps = ()
        for step in steps[: draw.integers(0, len(steps) + 1)]:
            world.do(step)
            assert world.served == _ALL, step
        there = [member.state for member in world.members.values()]
        if there == ["ready"] * replicas:
            return turn
        world.pass_time()
    raise AssertionError(world.members)


@pytest.mark.parametrize("seed", range(40))
def test_the_wanted_number_is_reached_and_every_expert_served_all_the_time(seed: int) -> None:
    draw = np.random.default_rng(seed)
    world = World(draw)

    for replicas in draw.integers(2, 9, 6).tolist():
        _run(world, replicas, draw)

    assert world.served == _ALL
