"""Which process of a cluster serves its metrics where. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.errors import ConfigError

_LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class MetricsPorts:
    """One port a process, None for each when none serves metrics."""

    services: tuple[int | None, ...]  # load controller, then routers
    servers: tuple[int | None, ...]  # expert servers, in the order in which they start


def metrics_ports(
    first: int | None, *, services: int, servers: int, node_each: bool
) -> MetricsPorts:
    """Controller, routers and expert servers from port `first` on, each the next one.

    With `node_each`, when every expert server has a node of its own, they all take `first`, so
    that one rule finds them, and the others the ports after it. 0 is any free port for each, None
    is no metrics at all. Raises ConfigError for a port that cannot be.
    """
    if not first:
        return MetricsPorts((first,) * services, (first,) * servers)
    last = first + services + (0 if node_each else servers - 1)
    if not 0 < first <= last <= _LAST_PORT:
        raise ConfigError(f"metrics_port is {first!r}, expected 0 to {_LAST_PORT - last + first}")
    if node_each:
        return MetricsPorts(tuple(range(first + 1, last + 1)), (first,) * servers)
    every = range(first, last + 1)
    return MetricsPorts(tuple(every[:services]), tuple(every[services:]))
