"""Translates ControlService calls to one `LoadController` and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

import grpc
import grpc.aio

from expertmesh.errors import InvalidRequestError, MeshError
from expertmesh.model import Slot
from expertmesh.rpc import status
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.server import parse, unary
from expertmesh.rpc.tasks import TaskSet
from expertmesh.v1 import control_pb2 as pb
from load_controller.controller import LoadController
from load_controller.drainer import Drainer
from load_controller.migration import Copy
from load_controller.mover import Migrated, Mover
from load_controller.rebalance_loop import RebalanceLoop
from load_controller.scaling import Bounds

_T = TypeVar("_T")
SERVICE = "expertmesh.v1.ControlService"


class Changes:
    """Wakes every watcher after a change."""

    def __init__(self) -> None:
        self.closing = False
        self._next: asyncio.Future[None] | None = None

    def close(self) -> None:
        """Nothing changes any more: every watch ends."""
        self.closing = True
        self.notify()

    def notify(self) -> None:
        """Something changed."""
        if self._next is not None and not self._next.done():
            self._next.set_result(None)

    def next(self) -> asyncio.Future[None]:
        """Done at the next change."""
        if self._next is None or self._next.done():
            self._next = asyncio.get_running_loop().create_future()
        return self._next


class ControlServicer:
    """Decode, one call, encode."""

    def __init__(
        self,
        controller: LoadController,
        mover: Mover,
        rebalancing: RebalanceLoop,
        changes: Changes,
        tasks: TaskSet,
    ) -> None:
        self._controller = controller
        self._mover = mover
        self._rebalancing = rebalancing
        self._drainer = Drainer(controller, mover)
        self._changes = changes
        self._tasks = tasks
        self.pushes = 0  # messages sent to routers that watch

    def handlers(self) -> dict[str, Any]:
        """The service's method table."""
        return {
            "AnnounceServer": unary(self.announce_server, pb.AnnounceServerRequest),
            "WatchCluster": grpc.unary_stream_rpc_method_handler(
                self.watch_cluster,
                response_serializer=pb.WatchClusterResponse.SerializeToString,
            ),
            "ReportAssignments": unary(self.report_assignments, pb.ReportAssignmentsRequest),
            "ReportExecutions": unary(self.report_executions, pb.ReportExecutionsRequest),
            "GetClusterLoad": unary(self.get_cluster_load, pb.GetClusterLoadRequest),
            "SetBalanceMode": unary(self.set_balance_mode, pb.SetBalanceModeRequest),
            "MigrateSlots": unary(self.migrate_slots, pb.MigrateSlotsRequest),
            "DrainServer": unary(self.drain_server, pb.DrainServerRequest),
            "GetFleet": unary(self.get_fleet, pb.GetFleetRequest),
            "SetServerBounds": unary(self.set_server_bounds, pb.SetServerBoundsRequest),
            "SetRebalancing": unary(self.set_rebalancing, pb.SetRebalancingRequest),
            "TakeLease": unary(self.take_lease, pb.TakeLeaseRequest),
        }

    async def announce_server(
        self, request: pb.AnnounceServerRequest, deadline: Deadline
    ) -> pb.AnnounceServerResponse:
        """See control.proto."""
        return self._controller.announce(request, time.monotonic())

    async def watch_cluster(
        self, buffer: bytes, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WatchClusterResponse]:
        """See control.proto."""
        controller = self._controller
        request = pb.WatchClusterRequest()
        try:
            request = parse(pb.WatchClusterRequest, buffer)
            controller.check_peer(
                f"router {request.router_id}", request.protocol_version, request.checkpoint_digest
            )
            controller.add_router(request)
        except MeshError as error:
            await context.abort_with_status(status.to_status(error))
        try:
            sent = (-1, -1, -1, -1)
            while not self._changes.closing:
                message, now = self._news(sent)
                changed = self._changes.next()
                if now != sent:
                    sent = now
                    self.pushes += 1
                    yield message
                else:
                    await asyncio.shield(changed)
        finally:
            controller.remove_router(request.router_id, request.incarnation, time.monotonic())

    def _news(
        self, sent: tuple[int, int, int, int]
    ) -> tuple[pb.WatchClusterResponse, tuple[int, int, int, int]]:
        """The parts that are newer than what was sent, and their versions."""
        controller = self._controller
        now = (
            controller.directory_version,
            controller.epoch,
            controller.bias_version,
            controller.beats,
        )
        message = pb.WatchClusterResponse()
        if now[1] != sent[1]:
            message.placement.CopyFrom(controller.placement())
        if now[2] != sent[2]:
            message.bias.CopyFrom(controller.bias())
        if now[0] != sent[0]:
            message.directory.CopyFrom(controller.directory())
        if now[3] != sent[3] and now[3]:
            message.beat.CopyFrom(controller.last_beat())
        return message, now

    async def report_assignments(
        self, request: pb.ReportAssignmentsRequest, deadline: Deadline
    ) -> pb.ReportAssignmentsResponse:
        """See control.proto."""
        self._controller.take_assignments(request, time.monotonic())
        return pb.ReportAssignmentsResponse()

    async def report_executions(
        self, request: pb.ReportExecutionsRequest, deadline: Deadline
    ) -> pb.ReportExecutionsResponse:
        """See control.proto."""
        self._controller.take_executions(request)
        return pb.ReportExecutionsResponse()

    async def get_cluster_load(
        self, request: pb.GetClusterLoadRequest, deadline: Deadline
    ) -> pb.GetClusterLoadResponse:
        """See control.proto."""
        return self._controller.load(time.monotonic())

    async def set_balance_mode(
        self, request: pb.SetBalanceModeRequest, deadline: Deadline
    ) -> pb.SetBalanceModeResponse:
        """See control.proto."""
        version = self._controller.set_mode(request.mode, request.reset)
        return pb.SetBalanceModeResponse(bias_version=version)

    async def migrate_slots(
        self, request: pb.MigrateSlotsRequest, deadline: Deadline
    ) -> pb.MigrateSlotsResponse:
        """See control.proto."""
        self._controller.scaling.check(request.fence)
        done: Migrated = await self._to_its_end(self._mover.migrate(*_moves(request.moves)))
        return pb.MigrateSlotsResponse(epoch=done.epoch, loaded=done.loaded, dropped=done.dropped)

    async def drain_server(
        self, request: pb.DrainServerRequest, deadline: Deadline
    ) -> pb.DrainServerResponse:
        """See control.proto."""
        self._controller.scaling.check(request.fence)
        loads, drops = _moves(request.moves)
        drain = self._drainer.drain(request.server_id, loads, drops)
        return pb.DrainServerResponse(loaded=await self._to_its_end(drain))

    async def _to_its_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What the work returns or raises. It has a task of its own: it goes on when the caller
        goes."""

        async def settled() -> _T | MeshError:
            try:
                return await work
            except MeshError as error:
                return error

        done = await asyncio.shield(self._tasks.spawn(settled(), "move experts"))
        if isinstance(done, MeshError):
            raise done
        return done

    async def get_fleet(
        self, request: pb.GetFleetRequest, deadline: Deadline
    ) -> pb.GetFleetResponse:
        """See control.proto."""
        now = time.monotonic()
        answer = self._controller.fleet(now)
        answer.rebalance.CopyFrom(self._rebalancing.report(now))
        return answer

    async def set_server_bounds(
        self, request: pb.SetServerBoundsRequest, deadline: Deadline
    ) -> pb.SetServerBoundsResponse:
        """See control.proto."""
        bounds = request.bounds
        self._controller.scaling.set_bounds(Bounds(bounds.min_replicas, bounds.max_replicas))
        return pb.SetServerBoundsResponse()

    async def set_rebalancing(
        self, request: pb.SetRebalancingRequest, deadline: Deadline
    ) -> pb.SetRebalancingResponse:
        """See control.proto."""
        self._rebalancing.enable(request.enabled)
        return pb.SetRebalancingResponse()

    async def take_lease(
        self, request: pb.TakeLeaseRequest, deadline: Deadline
    ) -> pb.TakeLeaseResponse:
        """See control.proto."""
        scaling = self._controller.scaling
        fence = scaling.take(request.owner, request.seconds, time.monotonic())
        scaling.report = request.report
        return pb.TakeLeaseResponse(fence=fence)


def _moves(moves: Iterable[pb.SlotMove]) -> tuple[list[Copy], list[Copy]]:
    """Copies to load and to drop. Raises InvalidRequestError."""
    found: dict[int, list[Copy]] = {pb.MOVE_ACTION_LOAD: [], pb.MOVE_ACTION_DROP: []}
    for move in moves:
        if move.action not in found:
            raise InvalidRequestError("a move is neither a load nor a drop", field="moves")
        found[move.action].append(Copy(move.server_id, Slot(move.layer, move.expert)))
    return found[pb.MOVE_ACTION_LOAD], found[pb.MOVE_ACTION_DROP]
