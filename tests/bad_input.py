"""A whole cluster with small limits, what is sent to it, and what it must be like afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import expertmesh
from expertmesh.config import ExpertConfig, RpcConfig
from expertmesh.rpc import session
from expertmesh.v1 import control_pb2_grpc, expert_pb2, expert_pb2_grpc, router_pb2_grpc
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh
from tests.rows import CLOSE, rows
from tests.rows import truth as truth_of
from tests.wire import RawStream, channel_to, proto, wait_until_idle

E, K = 16, 4  # experts of a layer, of which a token gets K
MOE, DENSE = 1, 0  # layers
#: Small, so that a test reaches them.
LIMITS = RpcConfig(host="127.0.0.1", drain_s=1.0, max_request_bytes=64 << 10, max_inflight_frames=3)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def sessions() -> Iterator[weakref.WeakSet[session.FrameSession]]:
    """Every stream that a server has served."""
    seen: weakref.WeakSet[session.FrameSession] = weakref.WeakSet()
    start = session.FrameSession.__init__

    def note(self: session.FrameSession, *arguments: Any) -> None:
        start(self, *arguments)
        seen.add(self)

    session.FrameSession.__init__ = note  # type: ignore[method-assign]
    yield seen
    session.FrameSession.__init__ = start  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def mesh(
    tmp_path_factory: pytest.TempPathFactory, sessions: weakref.WeakSet[session.FrameSession]
) -> Iterator[LocalMesh]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    quick = ExpertConfig(max_queue=1, announce_every_s=0.05)
    with local_mesh(path, router_rpc=LIMITS, backend="reference", config=quick) as cluster:
        cluster.model = model
        yield cluster


@pytest.fixture(scope="module")
def client(mesh: LocalMesh) -> Iterator[expertmesh.client.Mesh]:
    with expertmesh.connect(mesh.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def channel(mesh: LocalMesh) -> Iterator[grpc.Channel]:
    with channel_to(mesh.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def router(channel: grpc.Channel) -> router_pb2_grpc.RouterServiceStub:
    return router_pb2_grpc.RouterServiceStub(channel)


@pytest.fixture
def stream(router: router_pb2_grpc.RouterServiceStub) -> Iterator[RawStream]:
    with RawStream(router.ForwardStream) as opened:
        yield opened


@pytest.fixture
def control(mesh: LocalMesh) -> Iterator[control_pb2_grpc.ControlServiceStub]:
    with channel_to(mesh.controller.address) as opened:
        yield control_pb2_grpc.ControlServiceStub(opened)


@pytest.fixture
def shard(mesh: LocalMesh) -> Iterator[expert_pb2_grpc.ExpertServiceStub]:
    """The first expert server, which holds the first half of the experts."""
    with channel_to(mesh.servers[0].endpoint) as opened:
        yield expert_pb2_grpc.ExpertServiceStub(opened)


@pytest.fixture(autouse=True)
def the_cluster_serves_on_and_nothing_leaks(
    mesh: LocalMesh,
    client: expertmesh.client.Mesh,
    sessions: weakref.WeakSet[session.FrameSession],
) -> Iterator[None]:
    yield
    wait_until_idle(mesh)
    assert not any(each._frames and each._frames._frames for each in sessions)
    assert not any(queue._waiting or queue._running for queue in _queues(mesh))
    torch.testing.assert_close(client.forward(rows(5), MOE), truth(mesh, rows(5)), **CLOSE)


def _queues(mesh: LocalMesh) -> list[Any]:
    return list(mesh.routers[0].router._queues.values())


def put(tensor: torch.Tensor, where: tuple[int, ...], value: float) -> torch.Tensor:
    """A copy with another value there."""
    changed = tensor.clone()
    changed[where] = value
    return changed


def truth(mesh: LocalMesh, hidden: torch.Tensor) -> torch.Tensor:
    """What the MoE layer makes of them."""
    return truth_of(mesh, MOE, hidden)


def ids_of(*experts: int) -> torch.Tensor:
    """Three rows of them."""
    return torch.tensor([experts, experts, experts], dtype=torch.int32)


IDS, WEIGHTS = ids_of(0, 9, 15), torch.full((3, 3), 0.5)


def failure(call: Callable[[], Any]) -> grpc.RpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


class RawStreamOf(RawStream):
    """A raw ForwardStream with a channel of its own."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._channel = grpc.insecure_channel(mesh.address)
        super().__init__(router_pb2_grpc.RouterServiceStub(self._channel).ForwardStream)

    def __exit__(self, *what: object) -> None:
        super().__exit__(*what)
        self._channel.close()


def execute(
    mesh: LocalMesh, experts: list[int], epoch: int | None = None, **changes: Any
) -> expert_pb2.ExecuteRequest:
    """One row for these experts, planned with the newest placement."""
    body: dict[str, Any] = {
        "layer": MOE,
        "hidden_states": proto(rows(1)),
        "expert_ids": proto(torch.tensor([experts], dtype=torch.int32)),
        "expert_weights": proto(torch.ones(1, len(experts))),
        "epoch": mesh.routers[0].router.snapshot.slots.epoch if epoch is None else epoch,
    }
    return expert_pb2.ExecuteRequest(**{**body, **changes})
