"""What a service says of itself in numbers: declared once, read when somebody asks. Pure.

A service keeps plain integers and a few `Histogram`s while it works. Whoever wants to see them
calls one function of the service that yields a `Reading` for each; nothing is registered anywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

#: Upper bounds for waits and work of requests: a row on loopback takes 5 ms, a full batch seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)


class Histogram:
    """How many observations fell below each bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        """`bounds` are ascending upper bounds, each inclusive; what is above all has its own."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Bound as Prometheus writes it, and how many observations are at most that."""
        names = [*(str(bound) for bound in self.bounds), "+Inf"]
        below, found = 0, []
        for name, count in zip(names, self.counts, strict=True):
            below += count
            found.append((name, float(below)))
        return found


@dataclass(frozen=True, slots=True)
class Metric:
    """One name, with its meaning. Labels must have few values: see docs/operations.md."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Prometheus' convention, which its text format relies on.
        assert self.name.endswith("_total") == (self.kind == "counter"), self.name

    def of(self, value: float | Histogram, *labels: str) -> Reading:
        """The metric's value now, for these values of its labels."""
        assert len(labels) == len(self.labels), self.name
        return Reading(self, value, labels)


@dataclass(frozen=True, slots=True)
class Reading:
    """One value of one metric."""

    metric: Metric
    value: float | Histogram
    labels: tuple[str, ...]


def by_label(metric: Metric, counts: Mapping[str, int]) -> list[Reading]:
    """One reading for each value of the metric's only label."""
    return [metric.of(count, label) for label, count in sorted(counts.items())]


def one_of(metric: Metric, values: Sequence[str], now: str) -> list[Reading]:
    """One reading for each value that a state can have: 1 for the present one, 0 for the others."""
    return [metric.of(float(value == now), value) for value in values]
