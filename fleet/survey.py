"""What a running cluster holds and counts: asked of its router and servers, changing nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import grpc.aio
import numpy as np
import numpy.typing as npt

from expertmesh.client import AsyncMesh, connect_async
from expertmesh.info import MeshInfo
from expertmesh.rpc import loop, status
from expertmesh.rpc.answering import first_mesh_error
from expertmesh.rpc.channel import open_channel
from expertmesh.v1 import expert_pb2, expert_pb2_grpc, router_pb2

_TIMEOUT_S = 10.0
_CONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SurveyedServer:
    """One expert server."""

    name: str
    node: str
    state: str
    holds: Mapping[int, frozenset[int]]  # by layer index: expert ids; empty unless it is ready
    slot_bytes: float  # of the checkpoint, mean over its slots
    rate: float = 1.0  # relative to others


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """A cluster at one moment."""

    info: MeshInfo
    servers: tuple[SurveyedServer, ...]
    counts: Mapping[int, npt.NDArray[np.int64]]  # by layer index: [E] assignments, of either gate
    window_s: float  # in which they were counted; 0: since the cluster was first started
    epoch: int
    controller: str  # "host:port"


def survey(address: str, window_s: float = 0.0) -> Survey:
    """Asks the cluster of one router. Raises MeshError.

    With a window, the counts are those of so many seconds from now; else all so far.
    """
    return loop.run(_survey(address, window_s))


async def _survey(address: str, window_s: float) -> Survey:
    async with connect_async(address, timeout=_CONNECT_S) as mesh:
        before = await _counts(mesh)
        if window_s > 0:
            await asyncio.sleep(window_s)
        counts = await _counts(mesh)
        if window_s > 0:
            counts = {layer: total - before[layer] for layer, total in counts.items()}
        seen = await mesh.status()
        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(_ask(server)) for server in seen.servers]
        except BaseExceptionGroup as failures:
            raise first_mesh_error(failures) from None
        servers = [task.result() for task in asked]
        return Survey(
            info=mesh.describe(),
            servers=tuple(sorted(servers, key=lambda server: server.name)),
            counts=counts,
            window_s=window_s,
            epoch=seen.epoch,
            controller=seen.controller,
        )


async def _counts(mesh: AsyncMesh) -> dict[int, npt.NDArray[np.int64]]:
    load = await mesh.load()
    return {layer: counts.numpy() for layer, counts in load.counts.items()}


async def _ask(server: router_pb2.ServerStatus) -> SurveyedServer:
    holds: dict[int, frozenset[int]] = {}
    if server.state == "ready":
        channel = open_channel(server.endpoint)
        try:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            request = expert_pb2.DescribeShardRequest()
            answer = await stub.DescribeShard(request, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            peer = f"expert server {server.server_id} at {server.endpoint}"
            raise status.from_call(error, peer) from None
        finally:
            await channel.close()
        holds = {entry.layer: frozenset(entry.experts) for entry in answer.layers}
    return SurveyedServer(
        name=server.server_id,
        node=server.node,
        state=server.state,
        holds=holds,
        slot_bytes=server.total_bytes / max(server.slots, 1),
        rate=server.rate or 1.0,
    )
