"""The fixed number of servers that is as good as an autoscaled one. Pure."""

from __future__ import annotations

from dataclasses import replace

from expertmesh.errors import ConfigError
from load_controller.simulator.fleet import FleetSpec
from load_controller.simulator.report import Report
from load_controller.simulator.simulate import Control, simulate
from load_controller.simulator.trace import Trace


def smallest_static(
    trace: Trace, spec: FleetSpec, control: Control, delay_p99_s: float, most: int, seed: int = 0,
    known: dict[int, Report] | None = None,
) -> Report:  # fmt: skip
    """The report of the smallest fixed number of servers whose p99 is at most `delay_p99_s`.

    Found by bisection in the same simulator, between what holds every expert and `most`: more
    servers do not wait longer, but for differences between placements. `known` keeps the reports
    by number of servers, for another search with the same trace, servers and control. Raises
    ConfigError where even `most` wait longer.
    """
    known = {} if known is None else known

    def report_of(servers: int) -> Report:
        if servers not in known:
            fixed = replace(control, autoscale=None, servers=servers)
            known[servers] = simulate(trace, spec, fixed, seed)
        return known[servers]

    low, high = -(-trace.experts // spec.slots) - 1, most  # not enough, enough
    if report_of(most).delay_p99_s > delay_p99_s:
        raise ConfigError(
            f"{most} servers still wait {report_of(most).delay_p99_s:.3g} s (p99), "
            f"{delay_p99_s:.3g} s wanted"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if report_of(middle).delay_p99_s <= delay_p99_s:
            high = middle
        else:
            low = middle
    return report_of(high)
