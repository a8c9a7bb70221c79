"""The servers of a simulation: asked for, starting, serving, draining, gone; and paid for. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from expertmesh.errors import ConfigError
from load_controller.simulator.queues import Service


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetSpec:
    """What every server of a simulated cluster is like."""

    tokens_per_s: float = 25_000.0  # that one could do alone, with every expert
    slots: int = 16  # of one layer that it has room for
    service_s: float = 0.005  # mean time on the device of one request's part
    cv: float = 1.0  # coefficient of variation of that time
    startup_s: float = 30.0  # from asked for to announced, nothing loaded
    drain_s: float = 10.0  # from out of the placement to gone, at least
    model_layers: int = 58  # that the planned layers stand for, in bytes to load
    expert_bytes: float = 44e6  # of one slot (DeepSeek-V3's in FP8)
    load_bytes_per_s: float = 2e9  # that one server reads, checks and packs

    def __post_init__(self) -> None:
        for name in ("tokens_per_s", "service_s", "load_bytes_per_s"):
            if not 0 < getattr(self, name) < inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("cv", "startup_s", "drain_s", "expert_bytes"):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 0")
        for name in ("slots", "model_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def service(self) -> Service:
        """For the queues."""
        return Service(self.service_s, self.cv)


@dataclass(slots=True)
class Fleet:
    """Every server by its number; numbers are never used again. Paid for from asked for to gone."""

    spec: FleetSpec
    serving: list[int] = field(default_factory=list)  # announced; ascending
    starting: dict[int, float] = field(default_factory=dict)  # announced at
    draining: dict[int, float] = field(default_factory=dict)  # gone at
    made: int = 0

    def start(self, count: int, now_s: float) -> None:
        """Asks for servers."""
        for _ in range(count):
            self.starting[self.made] = now_s + self.spec.startup_s
            self.made += 1

    def cancel(self, count: int) -> int:
        """Takes back up to `count` servers that are still starting, the last first; how many."""
        last = sorted(self.starting)[::-1][:count]
        for server in last:
            del self.starting[server]
        return len(last)

    def drain(self, server: int, now_s: float, backlog_s: float) -> None:
        """Ends a server that is out of the placement, once what waits there is done."""
        self.serving.remove(server)
        self.draining[server] = now_s + max(self.spec.drain_s, backlog_s)

    def advance(self, now_s: float) -> None:
        """Servers that have started serve; servers that have drained are gone."""
        for server in [s for s, at in self.starting.items() if at <= now_s]:
            del self.starting[server]
            self.serving.append(server)
        self.serving.sort()
        for server in [s for s, at in self.draining.items() if at <= now_s]:
            del self.draining[server]

    @property
    def paid(self) -> int:
        """Servers that cost money now."""
        return len(self.serving) + len(self.starting) + len(self.draining)


def name_of(server: int) -> str:
    """As the planner knows it."""
    return f"server-{server:05d}"
