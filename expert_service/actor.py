"""The Ray actor around an expert server: start, address, stop. Nothing else of Ray is here."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

import ray

from expert_service.server import ExpertServer, Placing
from expertmesh.checkpoint import Checkpoint
from expertmesh.errors import CheckpointError, MeshError, UnavailableError
from expertmesh.model import Slot
from expertmesh.rpc import loop
from expertmesh.rpc.process import setup_logging

_log = logging.getLogger(__name__)
_REOPEN_PAUSE_S = 2.0  # a file system that is not mounted yet may be so soon


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertServerOptions:
    """Everything an actor's constructor needs, so that a restart needs nothing else."""

    checkpoint: str
    slots: tuple[Slot, ...]
    server_id: str
    controller: str  # "host:port"
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    weights: str = "auto"
    numa: str = "off"
    host: str = ""  # address to advertise; empty for the node's
    metrics_port: int | None = None  # 0 for any free one; None for no metrics


class ExpertServerHost:
    """Runs one expert server in this process; a plain class, so that it can be used without Ray.

    The constructor returns once the server listens, or has failed to: it loads in the background,
    tells the load controller how far it is, and says there, too, when it cannot serve.
    """

    def __init__(self, options: ExpertServerOptions, host: str, node: str) -> None:
        """`host` is the address that routers can reach, `node` what people call the machine."""
        self._options = options
        self._host = host
        self._node = node
        self._server: ExpertServer | None = None
        self._failure: MeshError | None = None
        loop.run(self._try_start())
        if isinstance(self._failure, CheckpointError):
            self._reopening = loop.submit(self._keep_trying())

    async def _keep_trying(self) -> None:
        while isinstance(self._failure, CheckpointError):
            await asyncio.sleep(_REOPEN_PAUSE_S)
            await self._try_start()

    async def _try_start(self) -> None:
        options = self._options
        try:
            server = ExpertServer(
                Checkpoint.open(options.checkpoint),
                options.slots,
                Placing(
                    server_id=options.server_id,
                    host=self._host,
                    node=self._node,
                    controller=options.controller,
                ),
                backend=options.backend,
                device=options.device,
                dtype=options.dtype,
                threads=options.threads,
                weights=options.weights,
                numa=options.numa,
                metrics_port=options.metrics_port,
            )
            await server.start()
        except MeshError as error:
            self._failure = type(error)(f"node {self._node}: {error.message}")
            _log.error("%s: %s", options.server_id, self._failure.message)
        else:
            self._failure, self._server = None, server

    def endpoint(self) -> str:
        """ "host:port" that routers can reach. Raises why there is none, naming the node."""
        failure = self._failure
        if failure is None and self._server is not None and self._server.failed.done():
            reason = self._server.failed.result()
            failure = type(reason)(f"node {self._node}: {reason.message}")
        if failure is not None:
            raise failure
        if self._server is None:
            raise UnavailableError(f"node {self._node}: the server has not started")
        return self._server.endpoint

    def status(self) -> bytes:
        """What the server says of itself, a `ServerStatus`. Raises why there is none."""
        self.endpoint()
        assert self._server is not None
        return self._server.status().SerializeToString()

    def pid(self) -> int:
        """Process id on this node."""
        return os.getpid()

    def node(self) -> str:
        """The node's address and id."""
        return self._node

    def visible_devices(self) -> str:
        """CUDA_VISIBLE_DEVICES as this server sees it."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def stop(self) -> None:
        """Drains and closes the server; the process may be ended afterwards."""
        if self._server is not None:
            loop.run(self._server.stop())


@ray.remote
class ExpertServerActor(ExpertServerHost):
    """One expert server as a Ray actor: restarted by Ray from its constructor.

    It listens on any free port of every interface, advertises its node's address, and publishes
    endpoint and incarnation to the load controller by itself, so that a restart needs nobody.
    """

    def __init__(self, options: ExpertServerOptions) -> None:
        setup_logging()
        address = ray.util.get_node_ip_address()
        node_id = ray.get_runtime_context().get_node_id()
        super().__init__(options, options.host or address, f"{address} ({node_id[:8]})")
