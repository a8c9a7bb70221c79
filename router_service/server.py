"""A running router: checkpoint gates, gRPC server, controller link."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.config import RouterConfig, RpcConfig
from expertmesh.errors import CheckpointError, MeshError
from expertmesh.model import GateWeights
from expertmesh.rpc.address import format_address, parse_address
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.own_address import advertised_host
from expertmesh.rpc.server import GrpcServer
from expertmesh.rpc.tasks import TaskSet
from expertmesh.telemetry.exposition import MetricsServer
from router_service import metrics
from router_service.controller_link import ControllerLink
from router_service.kernels.avx512_gate import Avx512Gate, create_avx512_gate
from router_service.pool import ExpertPool
from router_service.router import Router
from router_service.servicer import SERVICE, RouterServicer
from router_service.snapshot import Model

_log = logging.getLogger(__name__)
_LAST_REPORT_S = 1.0  # a stopping router tries this long to tell its last counts
_READY_CHECK_S = 0.05  # how soon health follows a server that came or went


def read_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Model:
    """The model as routers need it: gates, never experts.

    `dtype` is what the servers compute in, None for the checkpoint's own.
    """
    gates: dict[int, GateWeights] = {}
    kernels: dict[int, Avx512Gate] = {}
    for layer in checkpoint.spec.layers:
        if layer.gate is not None:
            gate = checkpoint.read_gate(layer.index)
            if layer.gate.logits_float32:  # converted once here instead of for every batch
                gate = GateWeights(gate.weight.float(), gate.bias, gate.shared_gate)
            gates[layer.index] = gate
            if (kernel := create_avx512_gate(gate, layer.gate)) is not None:
                kernels[layer.index] = kernel
        elif layer.num_experts:
            raise CheckpointError(f"layer {layer.index} has experts but no gate")
    dtype = dtype or checkpoint.spec.dtype
    return Model(checkpoint.spec, gates, checkpoint.digest, dtype, kernels)


class RouterServer:
    """One router. Made and used on one event loop."""

    def __init__(
        self,
        model: Model,
        *,
        router_id: str,
        controller: str,
        host: str,
        rpc: RpcConfig | None = None,
        config: RouterConfig | None = None,
        metrics_port: int | None = None,
    ) -> None:
        """`host` is the address that clients can reach: of every interface (0.0.0.0, ::) it is this
        machine's own. `controller` is "host:port". Raises ConfigError for what is neither.

        `metrics_port` 0 serves metrics on any free port, None serves none.
        """
        controller = str(parse_address(controller, "controller"))
        config = config or RouterConfig()
        rpc = rpc or RpcConfig()
        self.router = Router(model, ExpertPool(model.digest, config), config)
        self._host = advertised_host(host, controller)
        admission, data_port = Admission(rpc), DataPort.of(rpc)
        self._metrics = MetricsServer(
            lambda: metrics.read(self.router, self._link, admission, self._loop_failures()),
            rpc.host,
            metrics_port,
        )
        self._server = GrpcServer(rpc, admission, self._metrics, data_port)
        self._link = ControllerLink(self.router, router_id, controller, config.report_every_s)
        servicer = RouterServicer(self.router, self._link, admission, data_port, self._problem)
        self._server.add(SERVICE, servicer.handlers())
        self._tasks = TaskSet()

    @property
    def address(self) -> str:
        """ "host:port" that clients can reach; known once started."""
        return format_address(self._host, self._server.port)

    @property
    def metrics_address(self) -> str:
        """ "host:port" of `/metrics`; empty when none are served."""
        return format_address(self._host, self._metrics.port) if self._metrics.port else ""

    async def start(self) -> None:
        """Listens, then follows the controller. Raises ConfigError when it cannot listen."""
        await self._server.start()
        self._link.endpoint = self.address
        self._tasks.keep(self._link.watch, "watch controller")
        self._tasks.keep(self._link.report_all, "report counts")
        self._tasks.keep(self._follow_health, "follow health")
        _log.info("router at %s", self.address)

    def _loop_failures(self) -> dict[str, int]:
        """How often each loop of this router was ended by an error."""
        return self._tasks.failures | self.router.pool.tasks.failures

    def _problem(self) -> str:
        """What does not work now beside answering; empty when all is well."""
        own = (self._tasks.problem, self.router.pool.tasks.problem)
        return "; ".join(filter(None, (self._link.problem, *own)))

    async def _follow_health(self) -> None:
        """Health says SERVING exactly while every expert can be asked."""
        was: bool | None = None  # whatever it said before an error had ended this loop
        while True:
            now = not self.router.missing()
            if now != was:
                await self._server.set_serving(now)
                was = now
            await self.router.pool.wait_change(1.0)
            await asyncio.sleep(_READY_CHECK_S)

    async def stop(self) -> None:
        """Drains, tells the controller the last counts, and closes everything."""
        await self._server.stop()
        await self._tasks.close()
        try:
            await self._link.flush(Deadline.after(_LAST_REPORT_S), leaving=True)
        except MeshError as error:
            _log.warning("the last counts did not reach the load controller: %s", error.message)
        await self._link.close()
        await self.router.close()


def open_model(path: str | Path, dtype: torch.dtype | None = None) -> Model:
    """Reads what a router needs from a checkpoint folder. Raises CheckpointError."""
    return read_model(Checkpoint.open(path), dtype)
