"""The servers of a plan as arrays, checked. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertmesh.errors import ConfigError
from load_controller.planner_pack import Floats, Ints, Site, pack_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A server to place experts on."""

    name: str
    node: str = ""
    rate: float = 1.0  # measured rows/s; only the ratio between servers matters
    capacity: int | None = None  # most routed slots of one layer; None: an even share, rounded up


def site_of(
    load: Floats, servers: Sequence[Server], redundant: int, groups: int | None
) -> tuple[Site, Ints]:
    """The servers as arrays, and the slots of a layer that each node gets (one if they are alike).

    Nodes matter where groups, nodes and slots divide evenly and every node has room for its part.
    Raises ConfigError where the slots do not fit.
    """
    _check(servers, redundant)
    experts = load.shape[1]
    total = experts + redundant
    rate = np.array([server.rate for server in servers], np.float64)
    names = sorted({server.node for server in servers})
    node = np.array([names.index(server.node) for server in servers])
    if _groups_divide(experts, groups, len(names), total):
        assert groups is not None
        slots = np.full(len(names), total // len(names))
        capacity = _capacities(servers, node, slots)
        room = np.minimum(capacity, experts // len(names))
        if (np.bincount(node, room) >= slots).all():
            home = pack_groups(load, groups, np.bincount(node, rate).astype(np.float64))
            return Site(rate, capacity, node, home, experts // groups), slots
    node, slots = np.zeros_like(node), np.array([total])
    capacity = _capacities(servers, node, slots)
    room = int(np.minimum(capacity, experts).sum())
    if room < total:
        raise ConfigError(
            f"{experts} experts and {redundant} redundant slots a layer do not fit the {room} "
            f"slots of {len(servers)} servers: add servers or capacity, or plan fewer"
        )
    return Site(rate, capacity, node, np.zeros(load.shape, np.int64), experts), slots


def _groups_divide(experts: int, groups: int | None, nodes: int, total: int) -> bool:
    if groups is None or nodes == 1:
        return False
    if groups < 1 or experts % groups:
        raise ConfigError(f"{experts} experts do not divide into {groups} groups")
    return groups % nodes == 0 and total % nodes == 0


def _capacities(servers: Sequence[Server], node: Ints, slots: Ints) -> Ints:
    """[S] slots of one layer; an even share of the node's where a server names none."""
    on_node = np.bincount(node)
    return np.array(
        [
            math.ceil(slots[at] / on_node[at]) if server.capacity is None else server.capacity
            for server, at in zip(servers, node, strict=True)
        ]
    )


def _check(servers: Sequence[Server], redundant: int) -> None:
    if not servers:
        raise ConfigError("there are no servers to place experts on")
    if len({server.name for server in servers}) < len(servers):
        raise ConfigError("two servers have the same name")
    if redundant < 0:
        raise ConfigError(f"redundant is {redundant}, expected at least 0")
    for server in servers:
        if not (0 < server.rate < math.inf):
            raise ConfigError(
                f"server {server.name} has rate {server.rate}, expected a number above 0"
            )
        if server.capacity is not None and server.capacity < 0:
            raise ConfigError(
                f"server {server.name} has capacity {server.capacity}, expected at least 0"
            )
