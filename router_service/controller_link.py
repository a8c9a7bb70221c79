"""A router's two loops with the load controller: state comes down, counts go up."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc.aio

from expertmesh.errors import MeshError, MismatchError, UnavailableError
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.rpc import status
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.v1 import control_pb2, control_pb2_grpc
from router_service.router import Router
from router_service.snapshot import Model

_log = logging.getLogger(__name__)
_NEVER = (-1, -1, -1)
_REPORT_TIMEOUT_S = 5.0
_ALIVE_S = 3.0  # the controller's loop beats every second: three in a row are missing
_RECONNECT_PAUSE_S = 0.2  # a controller restarts in seconds; asking five times a second is cheap
_REFUSED_PAUSE_S = 5.0  # another controller may take its place, one of our fleet


class ControllerLink:
    """Keeps a router's snapshot and directory current, and the controller's counts.

    While the controller is away the router goes on with what it has; counts are totals, so the
    next report says all that was missed.
    """

    def __init__(
        self,
        router: Router,
        router_id: str,
        controller: str,
        report_every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.endpoint = ""
        self.controller = controller
        self.routers: list[str] = []
        self.connected = False
        self.refused: MismatchError | None = None
        self.beat = control_pb2.BalanceBeat(window_age_s=-1.0)
        self._beat_at: float | None = None
        self._clock = clock
        self._router = router
        self._router_id = router_id
        self._incarnation = uuid.uuid4().hex
        self._report_every_s = report_every_s
        self._sequence = 0
        self._reported = _NEVER
        self._reporting = asyncio.Lock()
        self._channel = open_channel(controller)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    @property
    def controller_age_s(self) -> float:
        """Seconds since the controller's loop was last heard; negative: never."""
        return -1.0 if self._beat_at is None else self._clock() - self._beat_at

    @property
    def balance_alive(self) -> bool:
        """Whether that loop, which moves biases, has been heard lately and can do its work."""
        return 0 <= self.controller_age_s <= _ALIVE_S and not self.beat.stalled

    @property
    def problem(self) -> str:
        """What the controller last said that does not work there; empty when all is well."""
        said = self.beat.problem if self.controller_age_s <= _ALIVE_S else ""
        return f"load controller: {said}" if said else ""

    async def watch(self) -> None:
        """Follows the cluster's state until cancelled; asks again where it is refused."""
        while True:
            pause_s = _RECONNECT_PAUSE_S
            request = control_pb2.WatchClusterRequest(
                router_id=self._router_id,
                incarnation=self._incarnation,
                endpoint=self.endpoint,
                protocol_version=PROTOCOL_VERSION,
                checkpoint_digest=self._router.model.digest,
                gates=_gates(self._router.model),
            )
            call = self._stub.WatchCluster(request)
            try:
                async for message in call:
                    if not self.connected:
                        self._reported = _NEVER  # it may be another controller than the last one
                    self.connected, self.refused = True, None
                    self._apply(message)
            except grpc.aio.AioRpcError as rpc_error:
                error = status.from_call(rpc_error, f"load controller at {self.controller}")
                if isinstance(error, MismatchError):
                    if self.refused is None:
                        _log.error("the load controller refuses this router: %s", error.message)
                    self.refused, pause_s = error, _REFUSED_PAUSE_S
                elif self.connected:
                    _log.warning("lost the load controller: %s; serving goes on", error.message)
            finally:
                call.cancel()  # a push that cannot be taken ends this loop, and leaves it open
                self.connected = False
            await asyncio.sleep(pause_s)

    def _apply(self, message: control_pb2.WatchClusterResponse) -> None:
        router = self._router
        if message.HasField("placement"):
            router.snapshot = router.snapshot.with_placement(message.placement, router.model.spec)
            router.pool.placed()
        if message.HasField("bias"):
            before = router.snapshot
            router.snapshot = before.with_bias(message.bias, router.model.gates)
            if router.snapshot.mode != before.mode:
                router.meter.restart()
        if message.HasField("directory"):
            self.routers = list(message.directory.routers)
            router.pool.update(message.directory.servers)
        if message.HasField("beat"):
            self.beat, self._beat_at = message.beat, self._clock()

    async def report_all(self) -> None:
        """Reports counts a few times a second, as long as they change."""
        while True:
            await asyncio.sleep(self._report_every_s)
            try:
                await self.flush(Deadline.after(_REPORT_TIMEOUT_S))
            except MeshError as error:
                _log.debug("report failed: %s", error.message)

    async def flush(self, deadline: Deadline, leaving: bool = False) -> None:
        """Makes the controller know every answer given before the call, and that it was the last.

        Where it knows them already, nothing is sent unless the router is `leaving`.
        """
        async with self._reporting:
            bias_version, epoch = self._router.snapshot.bias_version, self._router.oldest_epoch()
            state = (self._router.counts.version, bias_version, epoch)
            if state == self._reported and not leaving:
                return
            self._sequence += 1
            report = control_pb2.ReportAssignmentsRequest(
                source=self._router_id,
                incarnation=self._incarnation,
                sequence=self._sequence,
                bias_version=bias_version,
                epoch=epoch,
                samples=await self._router.samples(),
                leaving=leaving,
            )
            self._router.counts.report(report)
            await self._call(self._stub.ReportAssignments, report, deadline)
            self._reported = state

    async def cluster_load(self, deadline: Deadline) -> control_pb2.GetClusterLoadResponse:
        """The controller's totals, with this router's last answers in them."""
        await self.flush(deadline)
        response: control_pb2.GetClusterLoadResponse = await self._call(
            self._stub.GetClusterLoad, control_pb2.GetClusterLoadRequest(), deadline
        )
        return response

    async def _call(self, method: Any, request: object, deadline: Deadline) -> Any:
        started = time.monotonic()
        try:
            timeout = min(deadline.remaining, _REPORT_TIMEOUT_S)
            return await method(request, timeout=max(0.0, timeout))
        except grpc.aio.AioRpcError as rpc_error:
            error = status.from_call(rpc_error, f"load controller at {self.controller}")
            if isinstance(error, UnavailableError):
                raise UnavailableError(
                    f"{error.message} (tried for {time.monotonic() - started:.1f} s): serving goes "
                    "on and no count is lost; try again",
                    retry_after_s=1.0,
                ) from None
            raise error from None

    async def close(self) -> None:
        """Closes the channel; `watch` and `report_all` must have ended."""
        await self._channel.close()


def _gates(model: Model) -> list[control_pb2.LayerGate]:
    """How each MoE layer chooses, for the controller."""
    return [
        control_pb2.LayerGate(
            layer=layer.index,
            score=layer.gate.score,
            top_k=layer.gate.top_k,
            n_group=layer.gate.n_group,
            topk_group=layer.gate.topk_group,
            group_score=layer.gate.group_score,
            trained_bias=model.gates[layer.index].bias.tolist(),
        )
        for layer in model.spec.layers
        if layer.gate is not None
    ]
