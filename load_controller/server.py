"""A running load controller: store, gRPC server, clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from expertmesh.config import (
    BalanceConfig,
    RebalanceConfig,
    RpcConfig,
    ServerRates,
    check_server_rates,
)
from expertmesh.errors import UnavailableError
from expertmesh.rpc.address import format_address
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.own_address import advertised_host
from expertmesh.rpc.server import GrpcServer
from expertmesh.rpc.tasks import TaskSet
from expertmesh.telemetry.exposition import MetricsServer
from expertmesh.telemetry.metric import Reading, by_label
from load_controller import metrics
from load_controller.controller import LoadController
from load_controller.mover import Mover
from load_controller.rebalance_loop import RebalanceLoop
from load_controller.servicer import SERVICE, Changes, ControlServicer
from load_controller.store import Store

_log = logging.getLogger(__name__)
_TURN_S = 0.005  # between two lots of windows that are due: others have their turn in it
_TICK_S = 0.1  # how late a window may close for want of a report
_BEAT_S = 1.0  # between two signs of life; routers give the loop up after three


class ControllerServer:
    """One load controller. Made and used on one event loop."""

    def __init__(
        self,
        state_file: str | Path,
        *,
        host: str,
        balance: BalanceConfig | None = None,
        rebalance: RebalanceConfig | None = None,
        server_rates: ServerRates = "equal",
        rpc: RpcConfig | None = None,
        metrics_port: int | None = None,
    ) -> None:
        """`host` is the address that routers and servers can reach: of every interface (0.0.0.0,
        ::) it is this machine's own. Raises ConfigError for what is none, and for a state file
        that cannot be used.

        The port of the first start is kept in `state_file`: a restarted controller is found again
        where it was. With `rebalance` experts move by themselves. `server_rates` "measured" divides
        rows, and experts, by what servers have measured at their start. `metrics_port` 0 serves
        metrics on any free port, None serves none.
        """
        self._store = Store(state_file)  # first: what cannot be opened is the first to be said
        rpc, self._kept_port = rpc or RpcConfig(), self._store.meta("port")
        if rpc.port == 0:
            rpc = replace(rpc, port=int(self._kept_port or 0))
        changes = self._changes = Changes()
        check_server_rates(server_rates)
        self.controller = LoadController(
            self._store, balance or BalanceConfig(), changes.notify, server_rates
        )
        self._host = advertised_host(host)
        self._metrics = MetricsServer(self._readings, rpc.host, metrics_port)
        self._server = GrpcServer(rpc, Admission(rpc), self._metrics)
        self._ticked_at = time.monotonic()
        self._tasks = TaskSet()
        self._mover = Mover(self.controller)
        self.rebalancing = RebalanceLoop(self.controller, self._mover, rebalance)
        self._servicer = ControlServicer(
            self.controller, self._mover, self.rebalancing, changes, self._tasks
        )
        self._server.add(SERVICE, self._servicer.handlers())

    @property
    def address(self) -> str:
        """ "host:port" that peers can reach; known once started."""
        return format_address(self._host, self._server.port)

    @property
    def metrics_address(self) -> str:
        """ "host:port" of `/metrics`; empty when none are served."""
        return format_address(self._host, self._metrics.port) if self._metrics.port else ""

    def _readings(self) -> Iterator[Reading]:
        now = time.monotonic()
        pushes, age_s = self._servicer.pushes, now - self._ticked_at
        yield from metrics.read(self.controller, self.rebalancing.report(now), pushes, now, age_s)
        yield metrics.STORE_FAILURES.of(self._store.file.failures)
        yield metrics.STORE_WRITABLE.of(not self._store.file.problem)
        yield from by_label(metrics.LOOP_FAILURES, self._tasks.failures)

    async def start(self) -> None:
        """Listens. Raises ConfigError when it cannot."""
        await self._server.start()
        self._keep_port()
        self._tasks.keep(self._balance, "balance")
        self._tasks.keep(self._look_after_servers, "look after servers")
        self._tasks.keep(self._look_after_file, "look after the state file")
        self._tasks.keep(self._mover.clean, "drop leftovers")
        self._tasks.keep(self.rebalancing.run, "rebalance")
        await self._server.set_serving(True)
        _log.info("load controller at %s", self.address)

    async def _balance(self) -> None:
        """Closes windows, and says once a second that it does.

        What cannot be stored now is done later, and said meanwhile.
        """
        beat_at, pause_s = 0.0, _TICK_S
        while True:
            await asyncio.sleep(pause_s)
            now, pause_s = time.monotonic(), _TICK_S
            with suppress(UnavailableError):
                pause_s = _TURN_S if self.controller.close_windows(now) else _TICK_S
            if now >= beat_at:
                stalled = bool(self._store.file.problem)
                self.controller.beat(now, self._problem(), stalled)
                beat_at = now + _BEAT_S
            self._ticked_at = now

    def _problem(self) -> str:
        """What does not work now, for people; empty when all is well."""
        return "; ".join(filter(None, (self._store.file.problem, self._tasks.problem)))

    async def _look_after_servers(self) -> None:
        """Marks those that are lost, forgets those that have drained; says who is there."""
        while True:
            await asyncio.sleep(_TICK_S)
            with suppress(UnavailableError):  # the directory stays as it is while it cannot be kept
                self.controller.mark_lost(time.monotonic())
                self.controller.renew_directory()

    async def _look_after_file(self) -> None:
        """Finds out that there is room again, when nothing else would write."""
        while True:
            await asyncio.sleep(_BEAT_S)
            self._store.file.check()
            self._keep_port()

    def _keep_port(self) -> None:
        """Writes down where it listens, unless that is known; later, where it cannot be now."""
        port = str(self._server.port)
        if port != self._kept_port:
            with suppress(UnavailableError):
                self._store.set_meta("port", port)
                self._kept_port = port

    async def stop(self) -> None:
        """Closes the port and the file."""
        await self._tasks.close()
        self._changes.close()
        await self._server.stop()
        self._store.close()
