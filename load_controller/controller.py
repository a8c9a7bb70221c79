"""The load controller's state and what changes it. No network; time comes in as an argument."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from expertmesh.config import BalanceConfig
from expertmesh.errors import InvalidRequestError, MismatchError, SupersededError
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2
from load_controller.balancer import Balancer, max_violation
from load_controller.ledger import Counts, Ledger, Report, SourceKey
from load_controller.store import Store

_log = logging.getLogger(__name__)
LOST_AFTER_S = 5.0  # announcements come every second: five in a row are missing

ASSIGNMENTS, CALLER_GATED, EXECUTIONS = "assignments", "caller_gated", "executions"


class LoadController:
    """Directory, placement, counts and biases of one cluster. Used from one event loop.

    `on_change` is called after every change that routers must hear of.
    """

    def __init__(self, store: Store, balance: BalanceConfig, on_change: Callable[[], None]) -> None:
        self._store = store
        self._on_change = on_change
        self._digest = store.meta("digest")
        self.bias_version = int(store.meta("bias_version") or 0)
        self.directory_version = int(store.meta("directory_version") or 0)
        self.epoch = int(store.meta("epoch") or 0)
        self._servers: dict[str, pb.AnnounceServerRequest] = {}
        self._heard_at: dict[str, float] = {}
        self.routers: dict[str, tuple[str, str]] = {}  # router id: incarnation, endpoint
        self._router_epochs: dict[str, int] = {}
        self._top_k: dict[int, int] = {}
        self._ledgers = {kind: Ledger() for kind in (ASSIGNMENTS, CALLER_GATED, EXECUTIONS)}
        self._balancer = Balancer(balance, balance.mode)
        #: Since this process started, by kind of count: reports that brought news, and old ones.
        self.reports_taken = dict.fromkeys(self._ledgers, 0)
        self.reports_dropped = dict.fromkeys(self._ledgers, 0)
        self._restore()

    def _restore(self) -> None:
        """Takes up what an earlier incarnation had published."""
        for kind, ledger in self._ledgers.items():
            for report in self._store.reports(kind):
                ledger.take(report)
        for _, raw in self._store.servers():
            announcement = pb.AnnounceServerRequest.FromString(raw)
            self._servers[announcement.server.server_id] = announcement
        stored_mode = self._store.meta("balance_mode")
        self._balancer.deltas = self._store.deltas()
        if stored_mode is None:
            self._publish_bias()
        else:
            self._balancer.mode = stored_mode

    # Directory and placement.

    def check_peer(self, who: str, protocol: int, digest: str) -> None:
        """Raises MismatchError for a peer of another fleet; the first peer defines the fleet."""
        if protocol != PROTOCOL_VERSION:
            raise MismatchError(
                f"{who} speaks protocol version {protocol}, this controller {PROTOCOL_VERSION}: "
                "run the same release of expertmesh everywhere"
            )
        if not digest:
            raise MismatchError(f"{who} names no checkpoint digest")
        if self._digest is None:
            self._digest = digest
            self._store.set_meta("digest", digest)
        if digest != self._digest:
            raise MismatchError(
                f"{who} serves checkpoint {digest[:12]}, this cluster {self._digest[:12]}: start "
                "every server from the same files, or another cluster for another checkpoint"
            )

    def announce(self, request: pb.AnnounceServerRequest, now: float) -> pb.AnnounceServerResponse:
        """Takes one server's announcement."""
        server = request.server
        if not server.server_id or not server.incarnation:
            raise InvalidRequestError("an announcement needs server_id and incarnation")
        self.check_peer(
            f"server {server.server_id}", request.protocol_version, request.checkpoint_digest
        )
        before = self._servers.get(server.server_id)
        if before is not None and before.started_at_ns > request.started_at_ns:
            raise SupersededError(
                f"a newer incarnation of server {server.server_id} is announced from "
                f"{before.server.endpoint}: give each server an id of its own"
            )
        self._heard_at[server.server_id] = now
        if before is None or before.SerializeToString() != request.SerializeToString():
            self._accept(request, before)
        return pb.AnnounceServerResponse(oldest_epoch=self._oldest_epoch())

    def _accept(
        self, request: pb.AnnounceServerRequest, before: pb.AnnounceServerRequest | None
    ) -> None:
        moved = before is None or list(before.layers) != list(request.layers)
        server_id = request.server.server_id
        self.directory_version += 1
        self.epoch += moved
        self._store.save_server(
            server_id,
            request.started_at_ns,
            request.SerializeToString(),
            (self.directory_version, self.epoch),
        )
        self._servers[server_id] = request
        if before is None or before.server.state != request.server.state:
            _log.info("server %s at %s is %s", server_id, request.server.endpoint,
                      request.server.state)  # fmt: skip
        self._on_change()

    def _oldest_epoch(self) -> int:
        live = [epoch for router, epoch in self._router_epochs.items() if router in self.routers]
        return min(live, default=0)

    def mark_lost(self, now: float) -> None:
        """Marks servers that have not been heard of for LOST_AFTER_S."""
        for server_id, announcement in self._servers.items():
            heard = self._heard_at.setdefault(server_id, now)
            state = announcement.server.state
            if now - heard > LOST_AFTER_S and state != "lost":
                lost = pb.AnnounceServerRequest()
                lost.CopyFrom(announcement)
                lost.server.state = "lost"
                self._accept(lost, announcement)

    def add_router(self, router_id: str, incarnation: str, endpoint: str) -> None:
        """A router watches from now on."""
        self.routers[router_id] = (incarnation, endpoint)
        self.directory_version += 1
        self._on_change()

    def remove_router(self, router_id: str, incarnation: str) -> None:
        """A router's watch has ended, unless a newer incarnation has taken its place."""
        if self.routers.get(router_id, ("", ""))[0] == incarnation:
            del self.routers[router_id]
            self._router_epochs.pop(router_id, None)
            self.directory_version += 1
            self._on_change()

    def directory(self) -> pb.Directory:
        """Where everyone is."""
        return pb.Directory(
            version=self.directory_version,
            servers=[entry.server for _, entry in sorted(self._servers.items())],
            routers=sorted(endpoint for _, endpoint in self.routers.values()),
        )

    def placement(self) -> pb.Placement:
        """Who holds what."""
        return pb.Placement(
            epoch=self.epoch,
            servers=[
                pb.ServerSlots(server_id=server_id, layers=entry.layers)
                for server_id, entry in sorted(self._servers.items())
            ],
        )

    # Counts.

    def take_assignments(self, request: pb.ReportAssignmentsRequest, now: float) -> None:
        """Takes a router's totals."""
        self._router_epochs[request.source] = request.epoch
        for entry in request.layers:
            self._top_k[entry.layer] = entry.top_k
        gated = {e.layer: np.array(e.counts, np.int64) for e in request.layers}
        caller = {e.layer: np.array(e.caller_gated_counts, np.int64) for e in request.layers}
        news = self._take(ASSIGNMENTS, request, gated)
        self._take(CALLER_GATED, request, caller)
        if news is not None:
            self._balancer.count(news, self._top_k, now)
            self.close_windows(now)

    def take_executions(self, request: pb.ReportExecutionsRequest) -> None:
        """Takes a server's totals."""
        counts = {entry.layer: np.array(entry.counts, np.int64) for entry in request.layers}
        self._take(EXECUTIONS, request, counts)

    def _take(
        self,
        kind: str,
        request: pb.ReportAssignmentsRequest | pb.ReportExecutionsRequest,
        totals: dict[int, Counts],
    ) -> dict[int, Counts] | None:
        report = Report(SourceKey(request.source, request.incarnation), request.sequence, totals)
        news = self._ledgers[kind].take(report)
        if news is None:
            self.reports_dropped[kind] += 1
        else:
            self.reports_taken[kind] += 1
            self._store.save_report(kind, report)
        return news

    @property
    def balancer(self) -> Balancer:
        """What turns counts into deltas; to look at."""
        return self._balancer

    def totals(self, kind: str) -> dict[int, Counts]:
        """Counts of one kind by layer, over every source that ever reported."""
        return self._ledgers[kind].totals()

    def server_states(self) -> list[str]:
        """The state of every server that was ever announced."""
        return [entry.server.state for entry in self._servers.values()]

    def load(self) -> pb.GetClusterLoadResponse:
        """Every count so far."""
        caller = self._ledgers[CALLER_GATED].totals()
        layers = []
        for layer, counts in sorted(self._ledgers[ASSIGNMENTS].totals().items()):
            both = counts + caller.get(layer, np.zeros_like(counts))
            layers.append(
                router_pb2.LayerLoad(
                    layer=layer,
                    counts=counts.tolist(),
                    caller_gated_counts=caller[layer].tolist() if layer in caller else [],
                    max_violation=max_violation(both),
                    top_k=self._top_k.get(layer, 0),
                )
            )
        executions = [
            pb.LayerExecutions(layer=layer, counts=counts.tolist())
            for layer, counts in sorted(self._ledgers[EXECUTIONS].totals().items())
        ]
        return pb.GetClusterLoadResponse(
            layers=layers,
            executions=executions,
            bias_version=self.bias_version,
            epoch=self.epoch,
        )

    # Biases.

    def close_windows(self, now: float) -> None:
        """Closes what is due, and publishes when a delta moved."""
        if self._balancer.close_due(now):
            self._publish_bias()

    def set_mode(self, mode: str) -> int:
        """Changes the balance mode and publishes it. The version that carries it."""
        if mode not in ("frozen", "adaptive", "off"):
            raise InvalidRequestError(
                f"balance mode is {mode!r}, expected frozen, adaptive or off", field="mode"
            )
        self._balancer.set_mode(mode)
        self._publish_bias()
        return self.bias_version

    def _publish_bias(self) -> None:
        self.bias_version += 1
        self._store.save_bias(self.bias_version, self._balancer.mode, self._balancer.deltas)
        self._on_change()

    def bias(self) -> pb.BiasUpdate:
        """What is added to the trained biases."""
        return pb.BiasUpdate(
            version=self.bias_version,
            mode=self._balancer.mode,
            layers=[
                pb.LayerBias(layer=layer, delta=delta.tolist())
                for layer, delta in sorted(self._balancer.deltas.items())
                if bool(torch.count_nonzero(delta))
            ],
        )
