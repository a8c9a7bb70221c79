"""What a simulation found. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from load_controller.simulator.trace import Floats


@dataclass(frozen=True)
class Timeline:
    """What each step was like, [N] each."""

    at_s: Floats
    tokens_per_s: Floats
    paid: Floats  # servers, those that start and drain included
    placed: Floats  # servers that hold experts and are asked
    utilization: Floats  # mean of those; above 1 where a queue grows
    maxvio: Floats  # of servers, mean over layers
    slots: Floats  # of one layer, mean over layers
    delay_p99_s: Floats


@dataclass(frozen=True, kw_only=True)
class Report:
    """One trace under one control."""

    trace: str
    hours: float
    server_hours: float
    servers: tuple[int, float, int]  # paid for: least, mean, most
    slot_hours: float  # of one layer
    redundant_hours: float  # the part of it beyond one slot an expert
    maxvio_experts: float  # mean over layers, over time weighted by tokens
    maxvio_before: float  # of servers, at the first step
    maxvio_after: float  # of servers, by tokens, once the first plan is in force; else 0
    maxvio_last: float  # of servers, of the layer that is least even, at the last step
    maxvio_dispatched: float | None  # the same, mean over layers, of rows that a router dispatches
    plans: int  # that changed a placement
    loads: int  # slots loaded, of all planned layers
    loaded_bytes: float  # in the layers that these stand for
    scalings: int  # decisions for another number of servers
    delay_p50_s: float
    delay_p99_s: float
    overloaded: float  # part of the requests that met a server offered more than it can do
    timeline: Timeline = field(repr=False)

    def as_json(self) -> dict[str, object]:
        """Everything but the timeline, for programs."""
        least, mean, most = self.servers
        return {
            "trace": self.trace,
            "hours": self.hours,
            "server_hours": round(self.server_hours, 3),
            "servers": {"min": least, "mean": round(mean, 3), "max": most},
            "slot_hours": round(self.slot_hours, 3),
            "redundant_slot_hours": round(self.redundant_hours, 3),
            "maxvio_experts": round(self.maxvio_experts, 4),
            "maxvio_servers": {
                "before": round(self.maxvio_before, 4),
                "after": round(self.maxvio_after, 4),
                "last_worst_layer": round(self.maxvio_last, 4),
                "last_dispatched": _rounded(self.maxvio_dispatched),
            },
            "plans": self.plans,
            "slots_loaded": self.loads,
            "bytes_loaded": round(self.loaded_bytes),
            "scalings": self.scalings,
            "queue_delay_s": {"p50": self.delay_p50_s, "p99": self.delay_p99_s},
            "overloaded_share": round(self.overloaded, 6),
        }

    def lines(self) -> list[str]:
        """As a table for people."""
        least, mean, most = self.servers
        rows = [
            ("trace", f"{self.trace}, {self.hours:.1f} h"),
            ("servers paid for", f"{mean:.1f} on average, {least} to {most}"),
            ("server-hours", f"{self.server_hours:.1f}"),
            (
                "slot-hours of a layer",
                f"{self.slot_hours:.0f}, {self.redundant_hours:.0f} redundant",
            ),
            ("MaxVio of experts", f"{self.maxvio_experts:.2f}"),
            (
                "MaxVio of servers",
                f"{self.maxvio_before:.3f} at first, {self.maxvio_after:.3f} once planned",
            ),
            ("  as routers dispatch", _or_not_taken(self.maxvio_dispatched)),
            (
                "plans",
                f"{self.plans}, {self.loads} slots loaded, {self.loaded_bytes / 1e12:.2f} TB",
            ),
            ("changes of size", f"{self.scalings}"),
            ("queue delay p50", _seconds(self.delay_p50_s)),
            ("queue delay p99", _seconds(self.delay_p99_s)),
            ("requests that met overload", f"{100 * self.overloaded:.2f} %"),
        ]
        return [f"{name:<27} {value}" for name, value in rows]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _or_not_taken(value: float | None) -> str:
    return "not taken of so many servers" if value is None else f"{value:.3f} at the end"


def _seconds(value: float) -> str:
    return f"{1e3 * value:.2f} ms" if value < 1 else f"{value:.2f} s"


def mean_by(values: Floats, weights: Floats) -> float:
    """Weighted mean; 0 where nothing weighs."""
    total = float(weights.sum())
    return float(np.dot(values, weights)) / total if total > 0 else 0.0
