"""A cluster, and callers that have a data connection to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import expertmesh
from expertmesh.client import AsyncMesh
from expertmesh.rpc import loop
from expertmesh.rpc.stream import FrameStream
from expertmesh.v1 import router_pb2, router_pb2_grpc
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh
from tests.wire import RawConnection, channel_to, wait_until_idle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


@pytest.fixture(scope="module")
def mesh(checkpoint: tuple[Path, torch.nn.Module]) -> Iterator[LocalMesh]:
    path, model = checkpoint
    with local_mesh(path, backend="reference") as cluster:
        cluster.model = model
        yield cluster
        wait_until_idle(cluster)


@pytest.fixture
def method(mesh: LocalMesh) -> Iterator[Any]:
    with channel_to(mesh.address) as channel:
        yield router_pb2_grpc.RouterServiceStub(channel).ForwardStream


@pytest.fixture
def raw(method: Any) -> Iterator[RawConnection]:
    connection = RawConnection(method, router_pb2.ForwardStreamResponse)
    yield connection
    connection.close()


def stream_of(client: AsyncMesh) -> FrameStream:
    """The one to its only router."""
    (link,) = client._links.values()
    return loop.run(link.stream())


def connect(mesh: LocalMesh, **options: Any) -> AsyncMesh:
    """A client whose frames go over a data connection."""
    client: AsyncMesh = loop.run(expertmesh.connect_async(mesh.address, **options))
    stream = stream_of(client)
    loop.run(stream.settled())
    assert stream.has_connection
    return client
