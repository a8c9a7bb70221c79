"""The fixed number of servers that is as good as an autoscaled one. Pure."""

from __future__ import annotations

from dataclasses import replace

from expertmesh.errors import ConfigError
from load_controller.simulator.fleet import FleetSpec
from load_controller.simulator.report import Report
from load_controller.simulator.simulate import Control, simulate
from load_controller.simulator.trace import Trace


def smallest_static(
    trace: Trace, spec: FleetSpec, control: Control, delay_p99_s: float, most: int, seed: int = 0
) -> Report:
    """The report of the smallest fixed number of servers whose p99 is at most `delay_p99_s`.

    Found by bisection in the same simulator, between what holds every expert and `most`: more
    servers do not wait longer, but for differences between placements. Raises ConfigError where
    even `most` wait longer.
    """
    fixed = replace(control, autoscale=None)
    low = -(-trace.experts // spec.slots) - 1  # not enough
    high, best = most, simulate(trace, spec, replace(fixed, servers=most), seed)
    if best.delay_p99_s > delay_p99_s:
        raise ConfigError(
            f"{most} servers still wait {best.delay_p99_s:.3g} s (p99), {delay_p99_s:.3g} s wanted"
        )
    while high - low > 1:
        middle = (low + high) // 2
        report = simulate(trace, spec, replace(fixed, servers=middle), seed)
        if report.delay_p99_s <= delay_p99_s:
            high, best = middle, report
        else:
            low = middle
    return best
