"""Asks a cluster's load controller, past its routers.

A router's port is for those who send rows: whoever may use the cluster need not be able to change
how it answers others. So what operators do goes to the controller's own address.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt

from expertmesh.client import connect
from expertmesh.errors import InvalidRequestError
from expertmesh.rpc import loop, status
from expertmesh.rpc.address import parse_address
from expertmesh.rpc.channel import open_channel
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import control_pb2_grpc
from load_controller.planner import Move

LayerCounts = npt.NDArray[np.int64]  # [E]
_TIMEOUT_S = 5.0
_POLL_S = 0.02
_MIGRATE_S = 3600.0  # gigabytes from slow disks; the migration goes on when nobody waits


async def _call(address: str, method: str, request: Any, timeout_s: float = _TIMEOUT_S) -> Any:
    parse_address(address, "controller", InvalidRequestError)
    async with open_channel(address) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        try:
            return await getattr(stub, method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise status.from_call(error, f"load controller at {address}") from None


def set_balance_mode(address: str, mode: str, *, reset: bool = False) -> int:
    """Changes the mode ("": not), or takes deltas back; the bias version that says so.

    Raises InvalidRequestError for an address that is none, UnavailableError.
    """
    answer = loop.run(
        _call(address, "SetBalanceMode", pb.SetBalanceModeRequest(mode=mode, reset=reset))
    )
    return int(answer.bias_version)


def _slot_moves(moves: Iterable[Move]) -> list[pb.SlotMove]:
    actions = {"load": pb.MOVE_ACTION_LOAD, "drop": pb.MOVE_ACTION_DROP}
    return [
        pb.SlotMove(
            action=actions[move.action],
            layer=move.layer,
            expert=move.expert,
            server_id=move.server,
        )
        for move in moves
    ]


def begin_migration(
    address: str, moves: Iterable[Move], fence: int = 0
) -> Future[pb.MigrateSlotsResponse]:
    """Moves experts while requests go on; done when all is.

    A move's `layer` is the model's index. Raises what MigrateSlots in control.proto answers.
    """
    request = pb.MigrateSlotsRequest(moves=_slot_moves(moves), fence=fence)
    return loop.submit(_call(address, "MigrateSlots", request, timeout_s=_MIGRATE_S))


def migrate(address: str, moves: Iterable[Move]) -> pb.MigrateSlotsResponse:
    """The same, waited for."""
    return begin_migration(address, moves).result()


def begin_drain(
    address: str, server: str, moves: Iterable[Move], fence: int = 0
) -> Future[pb.DrainServerResponse]:
    """Makes the moves, then drains the server; done when it takes no more requests.

    Raises what DrainServer in control.proto answers.
    """
    request = pb.DrainServerRequest(server_id=server, moves=_slot_moves(moves), fence=fence)
    return loop.submit(_call(address, "DrainServer", request, timeout_s=_MIGRATE_S))


def get_fleet(address: str) -> pb.GetFleetResponse:
    """Every server with what it holds and how busy it is. Raises UnavailableError."""
    answer: pb.GetFleetResponse = loop.run(_call(address, "GetFleet", pb.GetFleetRequest()))
    return answer


def set_server_bounds(address: str, min_replicas: int, max_replicas: int) -> None:
    """How many servers there may be, by hand; 0 for as configured. Raises InvalidRequestError."""
    bounds = pb.ServerBounds(min_replicas=min_replicas, max_replicas=max_replicas)
    request = pb.SetServerBoundsRequest(bounds=bounds)
    loop.run(_call(address, "SetServerBounds", request))


def set_rebalancing(address: str, *, enabled: bool) -> None:
    """Lets experts move by themselves, or stops that. Raises UnavailableError."""
    loop.run(_call(address, "SetRebalancing", pb.SetRebalancingRequest(enabled=enabled)))


def take_lease(address: str, owner: str, seconds: float, report: pb.ScalingReport) -> int:
    """Takes, keeps or (0) gives back the right to add and remove servers; its fencing number.

    Raises LeaseLostError while another has it, UnavailableError.
    """
    request = pb.TakeLeaseRequest(owner=owner, seconds=seconds, report=report)
    return int(loop.run(_call(address, "TakeLease", request)).fence)


def counts(address: str) -> dict[int, LayerCounts]:
    """Assignments of either gate so far, by layer."""
    return {
        entry.layer: np.array(entry.counts, np.int64)
        + np.array(entry.caller_gated_counts or [0] * len(entry.counts), np.int64)
        for entry in cluster_load(address).layers
    }


def address_of(controller: str, router: Callable[[], str]) -> str:
    """The load controller's address: the one given, or that which a router names."""
    if controller:
        return controller
    with connect(router(), timeout=_TIMEOUT_S) as mesh:
        return mesh.status().controller


def cluster_load(address: str) -> pb.GetClusterLoadResponse:
    """What the controller knows of the load, and of who uses which version."""
    answer: pb.GetClusterLoadResponse = loop.run(
        _call(address, "GetClusterLoad", pb.GetClusterLoadRequest())
    )
    return answer


def wait_in_use(address: str, bias_version: int, timeout_s: float) -> pb.GetClusterLoadResponse:
    """Waits until every router that is known uses that version or a later one.

    Returns what the controller last knew, whether they do or `timeout_s` has passed. One that is
    away is waited for too: it may come back.
    """
    end = time.monotonic() + timeout_s
    while True:
        load = cluster_load(address)
        if all(router.bias_version >= bias_version for router in load.routers):
            return load
        if time.monotonic() > end:
            return load
        time.sleep(_POLL_S)
