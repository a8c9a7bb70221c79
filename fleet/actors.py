"""Ray actors around the router and the load controller. Ray restarts both from here."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from expert_service.actor import CONTROL
from expertmesh.config import BalanceConfig, RebalanceConfig, RouterConfig, RpcConfig, ServerRates
from expertmesh.errors import MeshError, UnavailableError
from expertmesh.rpc import loop
from expertmesh.rpc.process import settle_memory, setup_logging
from load_controller.server import ControllerServer
from router_service.server import RouterServer, open_model

_log = logging.getLogger(__name__)
_RETRY_PAUSE_S = 1.0  # a port is free again soon after its last holder died


Server = ControllerServer | RouterServer


class ServiceHost:
    """Keeps one service of this process up; a start that fails is tried again until it succeeds.

    So a restarted service waits for its port, say, instead of being given up by Ray.
    """

    def __init__(self, make: Callable[[], Server]) -> None:
        """`make` builds the service, on the event loop."""
        self._make = make
        self._server: Server | None = None
        self._failure: MeshError | None = None
        loop.run(self._try_start())
        if self._failure is not None:
            self._retrying = loop.submit(self._keep_trying())

    async def _keep_trying(self) -> None:
        while self._server is None:
            await asyncio.sleep(_RETRY_PAUSE_S)
            await self._try_start()

    async def _try_start(self) -> None:
        try:
            server = self._make()
            await server.start()
        except MeshError as error:
            self._failure = error
            _log.error("%s", error.message)
        else:
            settle_memory()
            self._failure, self._server = None, server

    def address(self) -> str:
        """ "host:port" of the service. Raises why it has not started."""
        if self._server is None:
            failure = self._failure or UnavailableError("the service has not started")
            raise failure.again()
        return self._server.address

    def pid(self) -> int:
        """Process id on this node."""
        return os.getpid()

    def ping(self) -> None:
        """Answers when the event loop runs, whatever else this process does."""
        loop.turn()

    def stop(self) -> None:
        """Drains and closes the service."""
        if self._server is not None:
            loop.run(self._server.stop())


@ray.remote(concurrency_groups={CONTROL: 1})
class LoadControllerActor(ServiceHost):
    """The load controller; its file keeps its state and port over restarts."""

    def __init__(
        self,
        state_file: str,
        balance: BalanceConfig,
        rebalance: RebalanceConfig | None,
        server_rates: ServerRates,
        host: str,
        metrics_port: int | None = None,
    ) -> None:
        setup_logging()
        host = host or ray.util.get_node_ip_address()
        super().__init__(
            lambda: ControllerServer(
                state_file,
                host=host,
                balance=balance,
                rebalance=rebalance,
                server_rates=server_rates,
                metrics_port=metrics_port,
            )
        )

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def ping(self) -> None:
        """See ServiceHost: in a thread of its own, for another call may take its time."""
        super().ping()


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterOptions:
    """Everything a router's constructor needs."""

    checkpoint: str
    dtype: torch.dtype
    router_id: str
    controller: str
    port: int
    host: str  # address to advertise; empty for the node's
    port_file: str  # keeps the port of the first start, so that clients find a restarted router
    config: RouterConfig
    metrics_port: int | None = None  # 0 for any free one; None for no metrics


@ray.remote(concurrency_groups={CONTROL: 1})
class RouterActor(ServiceHost):
    """One router."""

    def __init__(self, options: RouterOptions) -> None:
        setup_logging()
        self._options = options
        self._remembered = Path(options.port_file)
        super().__init__(self._router)

    def _router(self) -> RouterServer:
        options = self._options
        port = options.port
        if port == 0 and self._remembered.exists():
            port = int(self._remembered.read_text())
        return RouterServer(
            open_model(options.checkpoint, options.dtype),
            router_id=options.router_id,
            controller=options.controller,
            host=options.host or ray.util.get_node_ip_address(),
            rpc=RpcConfig(port=port, data_connections=options.config.data_connections),
            config=options.config,
            metrics_port=options.metrics_port,
        )

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def ping(self) -> None:
        """See ServiceHost: in a thread of its own, for another call may take its time."""
        super().ping()

    def address(self) -> str:
        """ "host:port" of the router. Raises why it has not started."""
        address = super().address()
        self._remembered.write_text(address.rpartition(":")[2])
        return address
