"""The Ray actor around an expert server: start, address, stop. Nothing else of Ray is here."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass

import ray

from expert_service.server import ExpertServer, Placing
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import DataConnectionMode, RpcConfig
from expertmesh.errors import CheckpointError, MeshError, UnavailableError
from expertmesh.model import Slot
from expertmesh.rpc import loop
from expertmesh.rpc.process import settle_memory, setup_logging

_log = logging.getLogger(__name__)
_REOPEN_PAUSE_S = 2.0  # a file system that is not mounted yet may be so soon
#: The Ray name of the actor that adds and removes servers.
SUPERVISOR = "supervisor"
#: The thread of an actor that answers while others work.
CONTROL = "control"
_LOOK_S = 5.0  # between two looks for the supervisor


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
    data_connections: DataConnectionMode = "auto"  # whether it takes any
    host: str = ""  # address to advertise; empty for the node's
    metrics_port: int | None = None  # 0 for any free one; None for no metrics
    #: Of a server that outlives whoever made it: the Ray namespace whose supervisor must be there.
    namespace: str = ""
    orphan_s: float = 60.0  # without one: whoever launched it may come back so soon, restarted


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
                rpc=RpcConfig(data_connections=options.data_connections),
                metrics_port=options.metrics_port,
            )
            await server.start()
        except MeshError as error:
            self._failure = self._located(error)
            _log.error("%s: %s", options.server_id, self._failure.message)
        else:
            settle_memory()
            self._failure, self._server = None, server
            self._watching = asyncio.get_running_loop().create_task(self._end_when_drained(server))

    async def _end_when_drained(self, server: ExpertServer) -> None:
        await server.drained
        await server.stop()
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        """Ends this process for good; a subclass knows how."""

    def endpoint(self) -> str:
        """ "host:port" that routers can reach. Raises why there is none, naming the node."""
        failure = self._failure
        if failure is None and self._server is not None and self._server.failed.done():
            failure = self._located(self._server.failed.result())
        if failure is not None:
            raise failure.again()
        if self._server is None:
            raise UnavailableError(f"node {self._node}: the server has not started")
        return self._server.endpoint

    def _located(self, error: MeshError) -> MeshError:
        """The same error, saying on which node."""
        return error.again(f"node {self._node}: {error.message}")

    def status(self) -> bytes:
        """What the server says of itself, a `ServerStatus`. Raises why there is none."""
        self.endpoint()
        assert self._server is not None
        return self._server.status().SerializeToString()

    def pid(self) -> int:
        """Process id on this node."""
        return os.getpid()

    def ping(self) -> None:
        """Answers when the event loop runs, whatever else this process does."""
        loop.turn()

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


@ray.remote(concurrency_groups={CONTROL: 1})
class ExpertServerActor(ExpertServerHost):
    """One expert server as a Ray actor: restarted by Ray from its constructor.

    It listens on any free port of every interface, advertises its node's address, and publishes
    endpoint and incarnation to the load controller by itself, so that a restart needs nobody.
    """

    def __init__(self, options: ExpertServerOptions) -> None:
        setup_logging()
        address = ray.util.get_node_ip_address()
        node_id = ray.get_runtime_context().get_node_id()
        self._me = ray.get_runtime_context().current_actor
        super().__init__(options, options.host or address, f"{address} ({node_id[:8]})")
        if options.namespace:
            threading.Thread(target=self._watch_supervisor, daemon=True).start()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def ping(self) -> None:
        """See ExpertServerHost: in a thread of its own, for another call may take its time."""
        super().ping()

    def _end(self) -> None:
        ray.kill(self._me, no_restart=True)  # no failure: its node may go, and it does not return

    def _watch_supervisor(self) -> None:
        """Ends a server that nobody will ever end: whoever launched it has gone.

        Ray knows the supervisor's name while it runs, and while Ray restarts it.
        """
        missed_at: float | None = None
        orphan_s = self._options.orphan_s
        while missed_at is None or time.monotonic() - missed_at < orphan_s:
            time.sleep(min(_LOOK_S, orphan_s / 2))
            try:
                ray.get_actor(SUPERVISOR, namespace=self._options.namespace)
                missed_at = None
            except ValueError:
                missed_at = missed_at or time.monotonic()
            except Exception as error:  # Ray itself is away: that says nothing of the supervisor
                _log.warning("looking for the supervisor: %s", error)
        _log.warning("no supervisor for %.0f s: this server ends", orphan_s)
        self.stop()
        self._end()
