"""Asks a cluster's load controller, past its routers.

A router's port is for those who send rows: whoever may use the cluster need not be able to change
how it answers others. So what operators do goes to the controller's own address.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import grpc.aio

from expertmesh.errors import InvalidRequestError
from expertmesh.rpc import loop, status
from expertmesh.rpc.channel import open_channel
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import control_pb2_grpc
from load_controller.planner import Move

_TIMEOUT_S = 5.0
_POLL_S = 0.02
_MIGRATE_S = 3600.0  # gigabytes from slow disks; the migration goes on when nobody waits


async def _call(address: str, method: str, request: Any, timeout_s: float = _TIMEOUT_S) -> Any:
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
    if ":" not in address:
        raise InvalidRequestError(f"controller is {address!r}, expected host:port")
    answer = loop.run(
        _call(address, "SetBalanceMode", pb.SetBalanceModeRequest(mode=mode, reset=reset))
    )
    return int(answer.bias_version)


def migrate(
    address: str, moves: Iterable[Move], rates: Mapping[str, float] | None = None
) -> pb.MigrateSlotsResponse:
    """Moves experts while requests go on; returns when all is done.

    A move's `layer` is the model's index. `rates` are the relative speeds of servers that the plan
    was made with, by name: routers divide rows by them. Raises what MigrateSlots in control.proto
    answers.
    """
    actions = {"load": pb.MOVE_ACTION_LOAD, "drop": pb.MOVE_ACTION_DROP}
    request = pb.MigrateSlotsRequest(
        moves=[
            pb.SlotMove(
                action=actions[move.action],
                layer=move.layer,
                expert=move.expert,
                server_id=move.server,
            )
            for move in moves
        ],
        server_rates=[
            pb.ServerRate(server_id=server, rate=rate) for server, rate in (rates or {}).items()
        ],
    )
    answer: pb.MigrateSlotsResponse = loop.run(
        _call(address, "MigrateSlots", request, timeout_s=_MIGRATE_S)
    )
    return answer


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
