"""What the autoscaler keeps between two decisions. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from expertmesh.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What servers measured since the last decision. None is "not known", which is not zero."""

    utilization: float | None = None  # work offered / capacity, mean; above 1 where a queue grows
    busiest: float | None = None  # the same of the busiest server
    ongoing: float | None = None  # requests waiting or computing at one server, mean
    queue_delay_s: float | None = None  # 99th percentile of the wait for a device
    reporting: int = 0  # servers that this comes from

    def __post_init__(self) -> None:
        for name in ("utilization", "busiest", "ongoing", "queue_delay_s"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}, expected a number >= 0, or None: not known")


@dataclass(frozen=True, slots=True)
class Seen:
    """A sample, when it came, and how many servers ran then."""

    at_s: float
    running: int
    sample: Sample

    @property
    def work(self) -> float | None:
        """Servers' worth of work offered."""
        utilization = self.sample.utilization
        return None if utilization is None else utilization * self.running


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """All that one decision hands to the next. Never changed, only replaced."""

    replicas: int  # servers decided on last
    at_s: float  # when
    reason: str  # why, in words
    samples: tuple[Seen, ...] = ()  # of the look-back, oldest first
    above_since_s: float | None = None  # since when more are wanted
    below_since_s: float | None = None  # since when fewer are wanted
    falling: tuple[tuple[float, int], ...] = ()  # when how many were wanted since then
    peaks: tuple[tuple[float, float], ...] = ()  # from when on, the most work in a part of a period
    quiet: bool = False  # copies are not needed
    quiet_since_s: float | None = None  # since when `quiet` should be the other

    def mean(self, of: Callable[[Seen], float | None]) -> float | None:
        """Mean over the samples that know; None when none does."""
        known = [value for seen in self.samples if (value := of(seen)) is not None]
        return sum(known) / len(known) if known else None
