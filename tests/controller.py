"""A load controller without a network, and what servers and routers tell it."""

from __future__ import annotations

from pathlib import Path

from expertmesh.config import BalanceConfig
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import expert_pb2, router_pb2
from load_controller.controller import LoadController
from load_controller.store import Store

LAYER = 2


def make_controller(path: Path | str = ":memory:", **balance: object) -> LoadController:
    """One that tells nobody."""
    return LoadController(Store(path), BalanceConfig(**balance), lambda: None)  # type: ignore[arg-type]


def make_announcement(
    server: str = "s0", started: int = 1, state: str = "ready", experts: tuple[int, ...] = (0, 1)
) -> pb.AnnounceServerRequest:
    """What an expert server says of itself."""
    return pb.AnnounceServerRequest(
        server=router_pb2.ServerStatus(
            server_id=server, incarnation=f"i{started}", endpoint="h:1", state=state
        ),
        protocol_version=PROTOCOL_VERSION,
        checkpoint_digest="digest",
        started_at_ns=started,
        layers=[expert_pb2.LayerSlots(layer=LAYER, experts=experts)],
    )


def make_report(
    counts: list[int], sequence: int = 1, source: str = "r0"
) -> pb.ReportAssignmentsRequest:
    """A router's totals of one layer."""
    layer = router_pb2.LayerLoad(
        layer=LAYER, counts=counts, caller_gated_counts=[0] * len(counts), top_k=2
    )
    return pb.ReportAssignmentsRequest(
        source=source, incarnation="i", sequence=sequence, layers=[layer]
    )
