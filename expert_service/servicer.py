"""Translates ExpertService calls to one shard and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from expert_service.runner import DeviceRunner
from expertmesh.codec import messages, narrow
from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.codec.slots import slots_of
from expertmesh.errors import StaleEpochError, UnavailableError
from expertmesh.model import Slot
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.narrowing import widening
from expertmesh.rpc.served_frames import FrameProtocol
from expertmesh.rpc.server import stream_tensor, unary, unary_tensor
from expertmesh.v1 import expert_pb2 as pb

SERVICE = "expertmesh.v1.ExpertService"


class Host(Protocol):
    """What the servicer asks of the server around it."""

    @property
    def state(self) -> str:
        """ "loading", "ready", "draining" or "failed"."""
        ...

    @property
    def oldest_epoch(self) -> int:
        """Requests planned with an older placement are refused."""
        ...

    def describe(self) -> pb.DescribeShardResponse:
        """See expert.proto."""
        ...

    async def load_slots(self, slots: Sequence[Slot]) -> list[str]:
        """Holds these slots too; their digests."""
        ...

    async def drop_slots(self, slots: Sequence[Slot]) -> None:
        """Holds these slots no more."""
        ...

    async def drain(self) -> None:
        """Takes no more requests, and ends."""
        ...


class ExpertServicer:
    """Decode, one call, encode."""

    def __init__(
        self,
        host: Host,
        runner: DeviceRunner,
        admission: Admission,
        data_port: DataPort | None = None,
    ) -> None:
        self._host = host
        self._runner = runner
        self._protocol = FrameProtocol(
            messages.EXECUTE_REQUEST,
            messages.EXECUTE_RESPONSE,
            widening(self.execute),
            admission,
            self.execute_now,
            data_port,
        )

    def handlers(self) -> dict[str, Any]:
        """The service's method table."""
        return {
            "DescribeShard": unary(self.describe_shard, pb.DescribeShardRequest),
            "Execute": unary_tensor(self._protocol),
            "ExecuteStream": stream_tensor(self._protocol),
            "LoadSlots": unary(self.load_slots, pb.LoadSlotsRequest),
            "DropSlots": unary(self.drop_slots, pb.DropSlotsRequest),
            "Drain": unary(self.drain, pb.DrainRequest),
        }

    async def describe_shard(
        self, request: pb.DescribeShardRequest, deadline: Deadline
    ) -> pb.DescribeShardResponse:
        """See expert.proto."""
        return self._host.describe()

    async def load_slots(
        self, request: pb.LoadSlotsRequest, deadline: Deadline
    ) -> pb.LoadSlotsResponse:
        """See expert.proto."""
        digests = await self._host.load_slots(slots_of(request.layers))
        return pb.LoadSlotsResponse(slot_digests=digests)

    async def drop_slots(
        self, request: pb.DropSlotsRequest, deadline: Deadline
    ) -> pb.DropSlotsResponse:
        """See expert.proto."""
        await self._host.drop_slots(slots_of(request.layers))
        return pb.DropSlotsResponse()

    async def drain(self, request: pb.DrainRequest, deadline: Deadline) -> pb.DrainResponse:
        """See expert.proto."""
        await self._host.drain()
        return pb.DrainResponse()

    async def execute(self, request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
        """See expert.proto."""
        self._check(request)
        return await self._runner.execute(request, deadline)

    def execute_now(self, request: ExecuteRequest) -> ExecuteResponse | None:
        """The same at once; None where the device's turn has to be waited for, and for FP8."""
        if request.hidden_states.dtype == narrow.FP8 or request.hidden_states_scale is not None:
            return None
        self._check(request)
        return self._runner.execute_now(request)

    def _check(self, request: ExecuteRequest) -> None:
        if self._host.state != "ready":
            raise UnavailableError(f"this expert server is {self._host.state}", retry_after_s=1.0)
        if request.epoch < self._host.oldest_epoch:
            raise StaleEpochError(
                f"epoch {request.epoch} is older than {self._host.oldest_epoch}, the oldest in "
                "use: take the newest placement and plan again"
            )
