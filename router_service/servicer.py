"""Translates RouterService calls to one `Router` and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from expertmesh.codec import messages, tensors
from expertmesh.errors import UnavailableError
from expertmesh.info import LayerInfo, layer_message
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.narrowing import widening
from expertmesh.rpc.served_frames import FrameProtocol
from expertmesh.rpc.server import stream_tensor, unary, unary_tensor
from expertmesh.v1 import router_pb2 as pb
from router_service.controller_link import ControllerLink
from router_service.router import Router

SERVICE = "expertmesh.v1.RouterService"


class RouterServicer:
    """Decode, one call, encode."""

    def __init__(
        self,
        router: Router,
        controller: ControllerLink,
        admission: Admission,
        data_port: DataPort | None = None,
        problem: Callable[[], str] = str,
    ) -> None:
        """`problem` says what does not work beside answering; empty when all is well."""
        self._router = router
        self._controller = controller
        self._problem = problem
        self._protocol = FrameProtocol(
            messages.FORWARD_REQUEST,
            messages.FORWARD_RESPONSE,
            widening(router.forward),
            admission,
            data_port=data_port,
        )

    def handlers(self) -> dict[str, Any]:
        """The service's method table."""
        return {
            "Describe": unary(self.describe, pb.DescribeRequest),
            "Forward": unary_tensor(self._protocol),
            "ForwardStream": stream_tensor(self._protocol),
            "GetLoad": unary(self.get_load, pb.GetLoadRequest),
            "GetStatus": unary(self.get_status, pb.GetStatusRequest),
        }

    async def describe(
        self, request: pb.DescribeRequest, deadline: Deadline
    ) -> pb.DescribeResponse:
        """See router.proto."""
        if self._controller.refused is not None:
            raise UnavailableError(self._controller.refused.message)
        model = self._router.model
        return pb.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            checkpoint_digest=model.digest,
            model_type=model.spec.model_type,
            hidden_size=model.spec.hidden_size,
            layers=[layer_message(LayerInfo.of(layer)) for layer in model.spec.layers],
            routers=self._controller.routers,
            compute_type=tensors.NUMBER_BY_DTYPE[model.dtype],  # type: ignore[arg-type]
        )

    async def get_load(self, request: pb.GetLoadRequest, deadline: Deadline) -> pb.GetLoadResponse:
        """See router.proto."""
        load = await self._controller.cluster_load(deadline)
        return pb.GetLoadResponse(
            layers=load.layers,
            bias_version=load.bias_version,
            epoch=load.epoch,
            balance=load.balance,
        )

    async def get_status(
        self, request: pb.GetStatusRequest, deadline: Deadline
    ) -> pb.GetStatusResponse:
        """See router.proto."""
        router, snapshot = self._router, self._router.snapshot
        reason = router.missing()
        if self._controller.refused is not None:
            reason = self._controller.refused.message
        return pb.GetStatusResponse(
            ready=not reason,
            reason=reason,
            servers=router.pool.statuses(),
            bias_version=snapshot.bias_version,
            epoch=snapshot.slots.epoch,
            controller_connected=self._controller.connected,
            controller=self._controller.controller,
            pid=os.getpid(),
            balance_mode=snapshot.mode,
            answered_requests=router.counts.answered_requests,
            retried_pairs=router.counts.retried_pairs,
            controller_age_s=self._controller.controller_age_s,
            balance_alive=self._controller.balance_alive,
            window_age_s=self._controller.beat.window_age_s,
            divergence=router.meter.share(),
            problem=self._problem(),
        )
