"""What `expertmesh top` shows: two looks at a cluster, and what happened between them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from expertmesh.info import MeshLoad
from expertmesh.v1 import router_pb2


@dataclass(frozen=True)
class Look:
    """One look at a cluster."""

    at_s: float  # monotonic
    load: MeshLoad
    routers: Sequence[router_pb2.GetStatusResponse]


@dataclass(frozen=True)
class LayerRow:
    """One MoE layer."""

    layer: int
    max_violation: float  # between the looks; since the cluster's start where nothing came
    window_max_violation: float  # of the controller's last window
    divergence: float
    max_abs_delta: float
    hottest: int  # expert with the most assignments between the looks
    hottest_share: float  # of the layer's assignments
    coldest: int
    coldest_share: float
    assignments_per_s: float


@dataclass(frozen=True)
class ServerRow:
    """One expert server, as all routers together see it."""

    server_id: str
    state: str
    connected: bool
    rows_per_s: float
    requests_in_flight: int
    backend: str
    node: str


@dataclass(frozen=True)
class Top:
    """All of it."""

    balance_mode: str
    balance_alive: bool
    bias_version: int
    epoch: int
    controller_connected: bool
    controller_age_s: float
    routers: int
    layers: tuple[LayerRow, ...]
    servers: tuple[ServerRow, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def compare(before: Look, after: Look) -> Top:
    """What two looks at one cluster say. `after` must have heard at least one router."""
    status = after.routers[0]
    passed_s = max(after.at_s - before.at_s, 1e-9)
    return Top(
        balance_mode=status.balance_mode,
        balance_alive=all(router.balance_alive for router in after.routers),
        bias_version=after.load.bias_version,
        epoch=after.load.epoch,
        controller_connected=all(router.controller_connected for router in after.routers),
        controller_age_s=max(router.controller_age_s for router in after.routers),
        routers=len(after.routers),
        layers=tuple(
            _layer(layer, before.load, after.load, passed_s) for layer in sorted(after.load.counts)
        ),
        servers=_servers(before.routers, after.routers, passed_s),
    )


def _layer(layer: int, before: MeshLoad, after: MeshLoad, passed_s: float) -> LayerRow:
    counts = after.counts[layer]
    new = counts - before.counts.get(layer, torch.zeros_like(counts))
    shown = (new if int(new.sum()) > 0 else counts).double()
    total = float(shown.sum()) or 1.0
    hottest, coldest = int(shown.argmax()), int(shown.argmin())
    mean = float(shown.mean())
    return LayerRow(
        layer=layer,
        max_violation=float(shown.max()) / mean - 1.0 if mean else 0.0,
        window_max_violation=after.window_maxvio.get(layer, 0.0),
        divergence=after.divergence.get(layer, 0.0),
        max_abs_delta=after.max_abs_delta.get(layer, 0.0),
        hottest=hottest,
        hottest_share=float(shown[hottest]) / total,
        coldest=coldest,
        coldest_share=float(shown[coldest]) / total,
        assignments_per_s=float(new.sum()) / passed_s,
    )


def _servers(
    before: Sequence[router_pb2.GetStatusResponse],
    after: Sequence[router_pb2.GetStatusResponse],
    passed_s: float,
) -> tuple[ServerRow, ...]:
    rows_before, rows_after = _answered(before), _answered(after)
    listed: dict[str, ServerRow] = {}
    for router in after:
        for server in router.servers:
            name = server.server_id
            known = listed.get(name)
            new = max(0, rows_after[name] - rows_before.get(name, rows_after[name]))
            listed[name] = ServerRow(
                server_id=name,
                state=server.state,
                connected=server.connected and (known is None or known.connected),
                rows_per_s=new / passed_s,
                requests_in_flight=server.requests_in_flight
                + (known.requests_in_flight if known else 0),
                backend=server.backend,
                node=server.node,
            )
    return tuple(row for _, row in sorted(listed.items()))


def _answered(routers: Sequence[router_pb2.GetStatusResponse]) -> Mapping[str, int]:
    """Rows that each server has computed for all routers together."""
    rows: dict[str, int] = {}
    for router in routers:
        for server in router.servers:
            rows[server.server_id] = rows.get(server.server_id, 0) + server.answered_rows
    return rows
