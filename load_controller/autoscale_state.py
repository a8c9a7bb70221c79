"""What the autoscaler keeps between two decisions, as data that goes to JSON and back. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
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

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> State:
        """The state that `to_json` wrote. Raises ConfigError for anything else."""
        try:
            raw = json.loads(text)
            samples = tuple(
                Seen(seen["at_s"], seen["running"], Sample(**seen["sample"]))
                for seen in raw.pop("samples")
            )
            if unknown := raw.keys() - {field.name for field in fields(cls)}:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            falling = tuple((at_s, wanted) for at_s, wanted in raw.pop("falling"))
            peaks = tuple((float(at_s), float(work)) for at_s, work in raw.pop("peaks", ()))
            state = cls(samples=samples, falling=falling, peaks=peaks, **raw)
            if not all(_is_count(n) for n in (state.replicas, *(n for _, n in falling))):
                raise ValueError("the servers are not a number")
            if not all(isfinite(number) for peak in peaks for number in peak):
                raise ValueError("a peak is not a number")
            times = (state.above_since_s, state.below_since_s, state.quiet_since_s)
            for time in (state.at_s, *(t for t in times if t is not None)):
                if not isfinite(time):
                    raise ValueError(f"a time is {time}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"the autoscaler's state cannot be read ({error}): drop it, and it begins from "
                "what runs"
            ) from None
        return state


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
