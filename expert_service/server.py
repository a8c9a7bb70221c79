"""A running expert server: checkpoint, backend, device thread, gRPC server, announcements."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from expert_service import metrics
from expert_service.announcer import Announcer
from expert_service.calibration import measure_pairs_per_s
from expert_service.kernels import create_backend
from expert_service.kernels.cpu.numa import choose_node, pin_this_thread, usable_nodes
from expert_service.runner import DeviceRunner
from expert_service.servicer import SERVICE, ExpertServicer
from expert_service.shard import ExpertShard
from expert_service.slots import SlotMover, free_host_bytes
from expertmesh.checkpoint import Checkpoint
from expertmesh.checkpoint.safetensors_file import Pause, no_pause
from expertmesh.codec.slots import layer_slots
from expertmesh.config import ExpertConfig, RpcConfig
from expertmesh.errors import ConfigError, MeshError, UnavailableError
from expertmesh.model import PROTOCOL_VERSION, ExpertWeights, Fp8ExpertWeights, Slot
from expertmesh.rpc.address import format_address, parse_address
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.answering import internal
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.own_address import advertised_host
from expertmesh.rpc.server import GrpcServer
from expertmesh.rpc.tasks import TaskSet
from expertmesh.telemetry.exposition import MetricsServer
from expertmesh.v1 import control_pb2, expert_pb2, router_pb2

_log = logging.getLogger(__name__)
_FIRST_ANSWER_S = 5.0  # a controller that is away does not keep a server from loading
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placing:
    """Who this server is and where it can be reached."""

    server_id: str  # stable across restarts
    host: str  # address that routers can reach; of 0.0.0.0 and :: it is this machine's own
    node: str = ""  # for people; the host's name when empty
    controller: str = ""  # "host:port"; empty to serve without one


def parse_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of that name; "auto" is the checkpoint's own. Raises ConfigError."""
    if name == "auto":
        return checkpoint.spec.dtype
    if name not in DTYPES:
        hint = ': experts are kept so by weights "int8"' if name == "int8" else ""
        raise ConfigError(f"dtype is {name!r}, expected auto, {', '.join(DTYPES)}{hint}")
    return DTYPES[name]


class ExpertServer:
    """One shard behind gRPC. Made and used on one event loop."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        slots: Sequence[Slot],
        placing: Placing,
        *,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 1,
        weights: str = "auto",
        numa: str = "off",
        rpc: RpcConfig | None = None,
        config: ExpertConfig | None = None,
        metrics_port: int | None = None,
    ) -> None:
        """`weights` says what becomes of the checkpoint's: see `kernels.WEIGHTS`.
        `numa` pins the device thread to a NUMA node: see `kernels.numa.choose_node`.
        `metrics_port` 0 serves metrics on any free port, None serves none. Raises ConfigError for
        slots, backends, dtypes or weights that cannot be.
        """
        config, rpc = config or ExpertConfig(), rpc or RpcConfig()
        if placing.controller:
            parse_address(placing.controller, "controller")
        self._host = advertised_host(placing.host, placing.controller)
        self._tasks = TaskSet()
        self._checkpoint = checkpoint
        self._placing = placing
        self._dtype = parse_dtype(dtype, checkpoint)
        nodes = usable_nodes()
        node = choose_node(numa, placing.server_id, nodes)
        self._pinned_cpus = None if node is None else nodes[node]
        self._backend = create_backend(
            backend,
            device,
            self._dtype,
            checkpoint.spec,
            threads,
            weights=weights,
            planned={slot: checkpoint.is_fp8(slot) for slot in slots},
        )
        self.shard = ExpertShard(checkpoint.spec, slots, self._backend)
        self._initial = tuple(slots)
        self._planned = tuple(slots)  # what it holds, or will hold once loaded
        self._runner = DeviceRunner(self.shard, threads, config)
        admission, data_port = Admission(rpc), DataPort.of(rpc)
        self._metrics = MetricsServer(
            lambda: metrics.read(
                self.status(), self.shard, self._runner, admission, self._tasks.failures
            ),
            rpc.host,
            metrics_port,
        )
        self._server = GrpcServer(rpc, admission, self._metrics, data_port)
        servicer = ExpertServicer(self, self._runner, admission, data_port)
        self._server.add(SERVICE, servicer.handlers())
        self._mover = SlotMover(
            self.shard,
            self._runner,
            self._read_expert,
            self._memory_bytes,
            free_host_bytes,
            config.load_share,
        )
        self._announcer: Announcer | None = None
        if placing.controller:
            self._announcer = Announcer(
                placing.controller, self._announcement, self._executions, config.announce_every_s
            )
        self.state = "loading"
        self._stopped = False
        self.error = ""
        self.incarnation = uuid.uuid4().hex
        self._started_at_ns = time.time_ns()
        self._loaded_bytes = 0
        self._pairs_per_s = 0.0  # not measured
        #: Done, with the reason, when this server can never serve: end the process.
        self.failed: asyncio.Future[MeshError] = asyncio.get_running_loop().create_future()
        #: Done when this server was told to drain: stop it, then end the process.
        self.drained: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def endpoint(self) -> str:
        """ "host:port" that routers can reach; known once started."""
        return format_address(self._host, self._server.port)

    @property
    def metrics_address(self) -> str:
        """ "host:port" of `/metrics`; empty when none are served."""
        return format_address(self._host, self._metrics.port) if self._metrics.port else ""

    @property
    def oldest_epoch(self) -> int:
        """See Host."""
        return self._announcer.oldest_epoch if self._announcer is not None else 0

    async def start(self) -> None:
        """Listens and begins to load; returns before the weights are there."""
        await self._server.start()
        if self._announcer is not None:
            self._tasks.keep(self._announce, "announce")
        self._tasks.spawn(self._load(), "load")
        self._tasks.spawn(self._fail_with_device(), "device thread")

    async def _announce(self) -> None:
        assert self._announcer is not None
        self._fail(await self._announcer.run())

    async def _fail_with_device(self) -> None:
        """Without its device thread a server answers nothing more: its process ends for it."""
        try:
            await self._runner.died
        except Exception as error:
            self._fail(internal(error))

    async def _load(self) -> None:
        try:
            if self._pinned_cpus is not None:  # before anything is packed
                await self._runner.call(pin_this_thread, self._pinned_cpus)
            await self._take_assigned()
            await self._runner.call(self.shard.load, self._read_expert, self._on_slot)
            self._pairs_per_s = await self._runner.call(
                measure_pairs_per_s,
                self._backend,
                self._checkpoint.spec,
                self.shard.slots,
                self._dtype,
            )
        except MeshError as error:
            self._fail(error)
        except Exception as error:
            self._fail(internal(error))
        else:
            self._set_state("ready")
            await self._server.set_serving(True)
            _log.info("%s ready at %s: %d slots", self._placing.server_id, self.endpoint,
                      len(self.shard.slots))  # fmt: skip

    async def _take_assigned(self) -> None:
        """Plans to load what the controller says that this server held before it was restarted."""
        announcer = self._announcer
        if announcer is None:
            return
        await announcer.first_answer(_FIRST_ANSWER_S)
        assigned = tuple(announcer.assigned)
        if assigned and set(assigned) != set(self._initial):
            self.shard.plan(assigned)
            self._planned = assigned
            _log.info("%s: experts have moved, %d slots instead of %d", self._placing.server_id,
                      len(assigned), len(self._initial))  # fmt: skip
            announcer.changed()

    async def load_slots(self, slots: Sequence[Slot]) -> list[str]:
        """Holds these slots too; their digests. See `SlotMover.load`."""
        self._require_ready()
        digests = await self._mover.load(slots)
        self._slots_changed()
        return digests

    async def drop_slots(self, slots: Sequence[Slot]) -> None:
        """Holds these slots no more."""
        self._require_ready()
        await self._mover.drop(slots)
        self._slots_changed()

    def _require_ready(self) -> None:
        if self.state != "ready":
            raise UnavailableError(f"this expert server is {self.state}", retry_after_s=1.0)

    def _slots_changed(self) -> None:
        self._planned = self.shard.slots
        self._loaded_bytes = self._total_bytes
        if self._announcer is not None:
            self._announcer.changed()

    @property
    def _total_bytes(self) -> int:
        return sum(map(self._checkpoint.slot_bytes, self._planned))

    def _memory_bytes(self, slot: Slot) -> int:
        layer = self._checkpoint.spec.layer(slot.layer)
        assert layer is not None  # the shard has checked the slot
        weights = 3 * layer.width(slot.expert) * self._checkpoint.spec.hidden_size
        return self._backend.host_footprint(weights, self._dtype)

    def _read_expert(self, slot: Slot, pause: Pause = no_pause) -> ExpertWeights | Fp8ExpertWeights:
        if self._backend.takes_fp8 and self._checkpoint.is_fp8(slot):
            return self._checkpoint.read_fp8_expert(slot, self._dtype, pause)
        return self._checkpoint.read_expert(slot, self._dtype, pause)

    def _on_slot(self, slot: Slot) -> None:
        self._loaded_bytes += self._checkpoint.slot_bytes(slot)

    def _fail(self, error: MeshError) -> None:
        self.error = error.message
        self._set_state("failed")
        _log.error("%s: %s", self._placing.server_id, error.message)
        if not self.failed.done():
            self.failed.set_result(error)
            self._tasks.spawn(self._server.set_serving(False), "health")

    def _set_state(self, state: str) -> None:
        self.state = state
        if self._announcer is not None:
            self._announcer.changed()

    def status(self) -> router_pb2.ServerStatus:
        """What this server says of itself."""
        return router_pb2.ServerStatus(
            server_id=self._placing.server_id,
            endpoint=self.endpoint,
            incarnation=self.incarnation,
            state=self.state,
            slots=len(self._planned),
            loaded_bytes=self._loaded_bytes,
            total_bytes=self._total_bytes,
            pairs_per_s=self._pairs_per_s,
            pid=os.getpid(),
            node=self._placing.node or socket.gethostname(),
            backend=self._backend.name,
            error=self.error or self._tasks.problem,
        )

    def describe(self) -> expert_pb2.DescribeShardResponse:
        """See expert.proto."""
        ready = self.state == "ready"
        digests = self.shard.slot_digests if ready else {}
        return expert_pb2.DescribeShardResponse(
            protocol_version=PROTOCOL_VERSION,
            checkpoint_digest=self._checkpoint.digest,
            server_id=self._placing.server_id,
            incarnation=self.incarnation,
            layers=layer_slots(self._planned),
            backend=self._backend.name,
            ready=ready,
            slot_digests=[digests[slot] for slot in sorted(digests)],
        )

    def _announcement(self) -> control_pb2.AnnounceServerRequest:
        return control_pb2.AnnounceServerRequest(
            server=self.status(),
            protocol_version=PROTOCOL_VERSION,
            checkpoint_digest=self._checkpoint.digest,
            started_at_ns=self._started_at_ns,
            layers=layer_slots(self._planned),
            initial_layers=layer_slots(self._initial),
            load=self._runner.use.message(self._runner.queue_seconds),
        )

    def _executions(self) -> control_pb2.ReportExecutionsRequest:
        return control_pb2.ReportExecutionsRequest(
            source=self._placing.server_id,
            incarnation=self.incarnation,
            layers=[
                control_pb2.LayerExecutions(layer=layer, counts=counts.tolist())
                for layer, counts in self.shard.execution_counts().items()
                if counts.any()
            ],
        )

    async def drain(self) -> None:
        """Says that it drains, and asks whoever runs this server to stop it."""
        if self.state != "draining":
            self._set_state("draining")
            await self._say_draining()
        if not self.drained.done():
            self.drained.set_result(None)

    async def _say_draining(self) -> None:
        if self._announcer is not None:
            try:
                await self._announcer.announce()
            except MeshError as error:
                _log.warning("draining unannounced: %s", error.message)

    async def stop(self) -> None:
        """Says that it drains, lets requests in flight end, closes everything; once is enough."""
        if self._stopped:
            return
        self._stopped = True
        if self.state != "draining":
            self._set_state("draining")
            await self._say_draining()
        await self._server.stop()
        await self._tasks.close()
        if self._announcer is not None:
            await self._announcer.close()
        self._mover.close()
        self._runner.close()
        self._checkpoint.close()
