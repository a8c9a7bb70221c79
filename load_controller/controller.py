"""The load controller's state and what changes it. No network; time comes in as an argument."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import get_args

from expertmesh.codec.slots import layer_slots
from expertmesh.config import BalanceConfig, BalanceMode, ServerRates
from expertmesh.errors import (
    InvalidRequestError,
    MismatchError,
    SupersededError,
    UnavailableError,
)
from expertmesh.model import PROTOCOL_VERSION, Slot
from expertmesh.rpc.address import parse_address
from expertmesh.v1 import control_pb2 as pb
from load_controller import messages
from load_controller.accounts import Accounts
from load_controller.balancer import Balancer
from load_controller.holdings import Holdings
from load_controller.migration import Copy, Step
from load_controller.rates import relative_rates
from load_controller.rebalancer import Holder
from load_controller.scaling import Scaling
from load_controller.store import Store

_log = logging.getLogger(__name__)
_MISSED_S = 3600.0  # a router that went without a word may still serve, cut off; told this long
LOST_AFTER_S = 5.0  # announcements come every second: five in a row are missing
FORGET_AFTER_S = 60.0  # a drained server: long enough for people to see where it has gone


@dataclass
class _Router:
    """One router that watches, and what it said to use in its last report."""

    incarnation: str
    endpoint: str
    bias_version: int = 0
    leaving: bool = False  # it has said so: nobody need miss it
    epoch: int = 0  # until it has reported, servers must keep every placement
    watches: int = 1  # of this incarnation: one that broke off may end long after the next began


class LoadController:
    """Directory, placement, counts and biases of one cluster. Used from one event loop.

    `on_change` is called after every change that routers must hear of.
    """

    def __init__(
        self,
        store: Store,
        balance: BalanceConfig,
        on_change: Callable[[], None],
        server_rates: ServerRates = "equal",
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._digest = store.meta("digest")
        self.bias_version = int(store.meta("bias_version") or 0)
        self.directory_version = int(store.meta("directory_version") or 0)
        self.epoch = int(store.meta("epoch") or 0)
        self._servers: dict[str, pb.AnnounceServerRequest] = {}
        self._heard_at: dict[str, float] = {}
        self._device_loads: dict[str, pb.DeviceLoad] = {}
        self.scaling = Scaling(store)
        self._routers: dict[str, _Router] = {}
        self._away: dict[str, tuple[_Router, float]] = {}  # and since when
        self.accounts = Accounts(store)
        self._holdings = store.holdings()
        self._measures = server_rates == "measured"
        self._measured: dict[str, float] = {}
        self.balancer = Balancer(balance, balance.mode)
        self._published = pb.BiasUpdate()
        self._broken = False
        self._directory_due = False
        self.beats = 0
        self._beat = pb.BalanceBeat(window_age_s=-1.0)
        self._restore()

    def _restore(self) -> None:
        """Takes up what an earlier incarnation had published."""
        for _, raw in self._store.servers():
            announcement = pb.AnnounceServerRequest.FromString(raw)
            self._servers[announcement.server.server_id] = announcement
        self._measured = self._relative_rates(self._servers)
        stored_mode = self._store.meta("balance_mode")
        self.balancer.restore(self._store.progress())
        if stored_mode is None:
            self._publish_bias()
        else:
            self.balancer.mode = stored_mode
            self._published = messages.bias_update(self.bias_version, self.balancer)

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
            self._store.set_meta("digest", digest)
            self._digest = digest
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
        _check_endpoint(server.endpoint)
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
        self._device_loads[server.server_id] = pb.DeviceLoad.FromString(
            request.load.SerializeToString()
        )
        request.ClearField("load")  # no news for routers, and none for the file
        if before is None or before.SerializeToString() != request.SerializeToString():
            self._accept(request, before)
        if gone := self._holdings.gone(request):
            holdings = self._holdings.copy()
            holdings.leaving -= gone
            self._take_over(holdings, self.epoch)
        assigned = self._holdings.to_load(request) if server.state == "loading" else ()
        return pb.AnnounceServerResponse(
            oldest_epoch=self.oldest_epoch(), layers=layer_slots(assigned)
        )

    def _accept(
        self, request: pb.AnnounceServerRequest, before: pb.AnnounceServerRequest | None
    ) -> None:
        moved = before is None or list(before.layers) != list(request.layers)
        server_id = request.server.server_id
        measured = self._relative_rates({**self._servers, server_id: request})
        moved |= measured != self._measured
        versions = (self.directory_version + 1, self.epoch + moved)
        self._store.save_server(
            server_id, request.started_at_ns, request.SerializeToString(), versions
        )
        self.directory_version, self.epoch = versions
        self._servers[server_id] = request
        self._measured = measured
        if before is None or before.server.state != request.server.state:
            _log.info("server %s at %s is %s", server_id, request.server.endpoint,
                      request.server.state)  # fmt: skip
        self._on_change()

    def oldest_epoch(self) -> int:
        """The oldest placement that a router may still use."""
        return min((router.epoch for router in self._routers.values()), default=0)

    def mark_lost(self, now: float) -> None:
        """Marks servers that have not been heard of for LOST_AFTER_S. Those that had said that
        they drain have gone, and are forgotten after FORGET_AFTER_S."""
        for server_id, announcement in list(self._servers.items()):
            silent_s = now - self._heard_at.setdefault(server_id, now)
            state = announcement.server.state
            if state == "draining":
                if silent_s > FORGET_AFTER_S:
                    self._forget(server_id)
            elif silent_s > LOST_AFTER_S and state != "lost":
                self._set_state(server_id, "lost")

    def mark_draining(self, server_id: str) -> None:
        """The server was told to drain, and has agreed; it says so itself, too."""
        if self.state_of(server_id) != "draining":
            self._set_state(server_id, "draining")

    def _set_state(self, server_id: str, state: str) -> None:
        before = self._servers[server_id]
        changed = pb.AnnounceServerRequest.FromString(before.SerializeToString())
        changed.server.state = state
        self._accept(changed, before)

    def _forget(self, server_id: str) -> None:
        holdings = self._holdings.copy()
        holdings.forget(server_id)
        with self._store.transaction():
            self._store.forget_server(server_id, self.directory_version + 1)
            self._store.save_holdings(holdings, self.epoch + 1)
        self._holdings = holdings
        self.directory_version += 1
        self.epoch += 1
        del self._servers[server_id], self._heard_at[server_id]
        self._measured = self._relative_rates(self._servers)
        self._device_loads.pop(server_id, None)
        _log.info("server %s has drained and is forgotten", server_id)
        self._on_change()

    def add_router(self, request: pb.WatchClusterRequest) -> None:
        """A router watches from now on. Raises InvalidRequestError for an endpoint or a gate that
        cannot be."""
        _check_endpoint(request.endpoint)
        gates = messages.gates_of(request)
        known = self._routers.get(request.router_id)
        if known is not None and known.incarnation == request.incarnation:
            known.watches += 1
        else:
            self._routers[request.router_id] = _Router(request.incarnation, request.endpoint)
        self._away.pop(request.router_id, None)
        self.balancer.gates |= gates
        self._directory_changed()

    def remove_router(self, router_id: str, incarnation: str, now: float) -> None:
        """A router's watch has ended: it has gone, unless another of its watches is open, or a
        newer incarnation has taken its place."""
        router = self._routers.get(router_id)
        if router is not None and router.incarnation == incarnation:
            router.watches -= 1
            if router.watches:
                return
            del self._routers[router_id]
            if not router.leaving:
                self._away[router_id] = (router, now)
            self.balancer.forget(router_id)
            self._directory_changed()

    def _directory_changed(self) -> None:
        """The list of routers is another one: said at once, or when it can be stored.

        A router that comes is served meanwhile; only that others hear of it has to wait.
        """
        self._directory_due = True
        with suppress(UnavailableError):
            self.renew_directory()

    def renew_directory(self) -> None:
        """Publishes a directory that is due. Raises UnavailableError."""
        if self._directory_due:
            self._store.set_meta("directory_version", str(self.directory_version + 1))
            self.directory_version += 1
            self._directory_due = False
            self._on_change()

    def directory(self) -> pb.Directory:
        """Where everyone is."""
        return pb.Directory(
            version=self.directory_version,
            servers=[
                messages.with_rate(entry.server, self._rate(server_id))
                for server_id, entry in sorted(self._servers.items())
            ],
            routers=sorted(router.endpoint for router in self._routers.values()),
        )

    def placement(self) -> pb.Placement:
        """Who holds what."""
        return pb.Placement(
            epoch=self.epoch,
            servers=[
                pb.ServerSlots(
                    server_id=server_id,
                    layers=layer_slots(self._holdings.shown(entry)),
                    rate=self._rate(server_id),
                )
                for server_id, entry in sorted(self._servers.items())
            ],
        )

    def _relative_rates(self, servers: Mapping[str, pb.AnnounceServerRequest]) -> dict[str, float]:
        """Of the servers that have loaded, where measurements count."""
        if not self._measures:
            return {}
        return relative_rates(
            {
                server_id: entry.server.pairs_per_s
                for server_id, entry in servers.items()
                if entry.server.state in ("ready", "draining")
            }
        )

    def _rate(self, server_id: str) -> float:
        """What was measured, else 1."""
        return self._measured.get(server_id, 1.0)

    # Migration: `mover` decides when; here is what becomes of the placement.

    def shown(self) -> dict[str, frozenset[Slot]]:
        """What each server that is ready is shown to hold."""
        return {
            server_id: self._holdings.shown(entry)
            for server_id, entry in self._servers.items()
            if entry.server.state == "ready"
        }

    def holders(self) -> list[Holder]:
        """The same, with each server's node and relative speed."""
        return [
            Holder(name, self._servers[name].server.node, held, self._rate(name))
            for name, held in sorted(self.shown().items())
        ]

    def rebalancing_setting(self) -> bool | None:
        """Whether experts may move by themselves, as set by hand; None where nobody has."""
        said = self._store.meta("rebalancing")
        return None if said is None else said == "on"

    def set_rebalancing(self, enabled: bool) -> None:
        """Notes what was set by hand."""
        self._store.set_meta("rebalancing", "on" if enabled else "off")

    def state_of(self, server_id: str) -> str:
        """A server's state. Raises InvalidRequestError for one that is not known."""
        entry = self._servers.get(server_id)
        if entry is None:
            raise InvalidRequestError(
                f"there is no server {server_id!r}: name one of {', '.join(sorted(self._servers))}",
                field="server_id",
            )
        return entry.server.state

    def address_of(self, server_id: str) -> str:
        """Where a known server listens, whatever its state."""
        return self._servers[server_id].server.endpoint

    def fleet(self, now: float) -> pb.GetFleetResponse:
        """Every server, and how many there may be."""
        shown = {name: self._holdings.shown(entry) for name, entry in self._servers.items()}
        return messages.fleet(
            self._servers, shown, self._device_loads, self.epoch, self.scaling, self._rate, now
        )

    def endpoint(self, server_id: str) -> str:
        """Where a server listens. Raises UnavailableError when it is not ready."""
        entry = self._servers.get(server_id)
        if entry is None or entry.server.state != "ready":
            raise UnavailableError(f"expert server {server_id} is not ready", retry_after_s=1.0)
        return entry.server.endpoint

    def expect(self, copies: Iterable[Copy]) -> None:
        """These copies will be loaded, and not be shown until the switch."""
        holdings = self._holdings.copy()
        holdings.arriving |= set(copies)
        self._take_over(holdings, self.epoch)

    def give_up(self, copies: Iterable[Copy]) -> None:
        """These copies shall go again; nobody was shown them. The file says so already: it has
        them as hidden, as it has those that leave."""
        self._holdings.give_up(copies)

    def switch(self, step: Step) -> int:
        """Publishes what a step changes as one placement. Its epoch."""
        holdings = self._holdings.copy()
        holdings.switch(step)
        for server_id in {copy.server for copy in (*step.loads, *step.drops)}:
            holdings.assign(self._servers[server_id])
        self._take_over(holdings, self.epoch + 1)
        self._on_change()
        return self.epoch

    def _take_over(self, holdings: Holdings, epoch: int) -> None:
        """Raises UnavailableError, and then changes nothing."""
        self._store.save_holdings(holdings, epoch)
        self._holdings, self.epoch = holdings, epoch

    def is_used_everywhere(self, epoch: int, now: float) -> bool:
        """Whether no router uses an older placement any more, also none that was cut off."""
        self._forget_missed(now)
        return not self._away and all(each.epoch >= epoch for each in self._routers.values())

    def leaving(self) -> set[Copy]:
        """Copies that nobody is shown and that shall go."""
        return set(self._holdings.leaving)

    # Counts.

    def take_assignments(self, request: pb.ReportAssignmentsRequest, now: float) -> None:
        """Takes a router's totals and samples. Raises InvalidRequestError for impossible ones, and
        UnavailableError where they cannot be stored: then nothing was taken, and the router's next
        totals say it all again.
        """
        router = self._routers.get(request.source)
        if router is not None and router.incarnation == request.incarnation:
            router.bias_version, router.epoch = request.bias_version, request.epoch
            router.leaving = request.leaving
        elif request.leaving:  # its watch has ended first
            self._away.pop(request.source, None)
        scores = messages.scores_of(request, self.balancer.gates)
        shares = self.accounts.take_shares(request)
        news = self.accounts.read_assignments(request)
        if news is None:
            return

        def balance() -> bool:
            cut = self.balancer.sample_all(request.source, scores, shares, now)
            self.balancer.count(news.assignments, news.top_k, now)
            return self.balancer.close_due(now) or cut

        with self._stored():
            self.accounts.save(news)
            self._publish_if(balance)
        self.accounts.add(news)

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """What is decided within it is stored, all of it, or was never decided.

        Routers are told in the loop's next turn, after this. Raises UnavailableError.
        """
        before, published = self.balancer.now(), (self.bias_version, self._published)
        try:
            with self._store.transaction():
                yield
        except BaseException:
            self.balancer.take_back(before)
            self.bias_version, self._published = published
            raise

    def take_executions(self, request: pb.ReportExecutionsRequest) -> None:
        """Takes a server's totals. Raises InvalidRequestError for impossible ones, and
        UnavailableError."""
        self.accounts.take_executions(request)

    @property
    def routers(self) -> int:
        """How many routers watch now."""
        return len(self._routers)

    def server_states(self) -> list[str]:
        """The state of every server that was ever announced."""
        return [entry.server.state for entry in self._servers.values()]

    def load(self, now: float) -> pb.GetClusterLoadResponse:
        """Every count so far, how each layer is balanced, and who uses which bias."""
        return pb.GetClusterLoadResponse(
            layers=self.accounts.layer_loads(),
            executions=self.accounts.layer_executions(),
            bias_version=self.bias_version,
            epoch=self.epoch,
            balance=messages.layer_balances(self.balancer),
            routers=self._router_states(now),
            beat=self._beat,
            balance_mode=self.balancer.mode,
        )

    def _router_states(self, now: float) -> list[pb.RouterState]:
        self._forget_missed(now)
        known = {name: (router, -1.0) for name, router in self._routers.items()}
        known |= {name: (router, now - at) for name, (router, at) in self._away.items()}
        return [
            pb.RouterState(
                router_id=name,
                endpoint=router.endpoint,
                bias_version=router.bias_version,
                epoch=router.epoch,
                away_s=away_s,
            )
            for name, (router, away_s) in sorted(known.items())
        ]

    def _forget_missed(self, now: float) -> None:
        self._away = {n: (r, at) for n, (r, at) in self._away.items() if now - at < _MISSED_S}

    # Biases.

    def close_windows(self, now: float) -> bool:
        """Closes what is due, and publishes when a delta moved. Whether more is due.

        Raises UnavailableError; the windows are open then, as before.
        """
        # Rules that fail are noticed when nothing is due, too; the file is left alone then.
        with self._stored() if self.balancer.is_due(now) else nullcontext():
            self._publish_if(lambda: self.balancer.close_due(now))
        return not self._broken and self.balancer.is_due(now)

    def _publish_if(self, moved: Callable[[], bool]) -> None:
        """Publishes when a decision has moved a delta.

        A decision that fails stops balancing, audibly: no more beats. It stops nothing else; counts
        are kept, and the published bias holds until someone sets a mode.
        """
        if self._broken:
            return
        try:
            publish = moved()
        except Exception:
            self._broken = True
            _log.exception("balancing has stopped; `expertmesh balance` starts it anew")
            return
        if publish:
            self._publish_bias()

    def beat(self, now: float, problem: str = "", stalled: bool = False) -> None:
        """The loop is alive: tells every router so, and what does not work in this process.

        `stalled` says that biases stand still for it. While the rules have failed there is no beat.
        """
        if self._broken:
            return
        closed_at = self.balancer.closed_at
        self.beats += 1
        self._beat = pb.BalanceBeat(
            number=self.beats,
            closed_windows=self.balancer.closed_windows,
            window_age_s=-1.0 if closed_at is None else now - closed_at,
            problem=problem,
            stalled=stalled,
        )
        self._on_change()

    def last_beat(self) -> pb.BalanceBeat:
        """What the loop last said."""
        return self._beat

    def set_mode(self, mode: str, reset: bool = False) -> int:
        """Changes the mode ("": not), takes deltas back, publishes. The version that says so."""
        mode = mode or self.balancer.mode
        if mode not in get_args(BalanceMode):
            raise InvalidRequestError(
                f"balance mode is {mode!r}, expected frozen, adaptive or off", field="mode"
            )
        with self._stored():
            self.balancer.set_mode(mode, reset)
            self._publish_bias()
        self._broken = False
        _log.info("balance mode %s, bias version %d", mode, self.bias_version)
        return self.bias_version

    def _publish_bias(self) -> None:
        version = self.bias_version + 1
        self._store.save_bias(version, self.balancer.mode, self.balancer.progress())
        self.bias_version = version
        self._published = messages.bias_update(version, self.balancer)
        self._on_change()

    def bias(self) -> pb.BiasUpdate:
        """What is added to the trained biases, as published."""
        return self._published


def _check_endpoint(endpoint: str) -> None:
    """Raises InvalidRequestError for what others would try to reach for ever."""
    if endpoint:
        parse_address(endpoint, "endpoint", InvalidRequestError)
