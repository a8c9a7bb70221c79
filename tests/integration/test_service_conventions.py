"""What gRPC users expect of any server: health checks and reflection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import expertmesh
from expertmesh.rpc import loop
from expertmesh.rpc.server import LIVENESS
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("olmoe", path)
    return path


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[LocalMesh]:
    with local_mesh(checkpoint) as cluster:
        yield cluster


def _health(address: str, service: str = "", timeout_s: float = 5.0) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        status: int = stub.Check(request, timeout=timeout_s).status
        return status


def _addresses(cluster: LocalMesh) -> dict[str, str]:
    return {
        "expertmesh.v1.RouterService": cluster.routers[0].address,
        "expertmesh.v1.ExpertService": cluster.servers[0].endpoint,
        "expertmesh.v1.ControlService": cluster.controller.address,
    }


def test_every_service_is_healthy_and_says_what_it_speaks(checkpoint: Path) -> None:
    with local_mesh(checkpoint) as cluster:
        for service, address in _addresses(cluster).items():
            wait_until(lambda a=address: _health(a) == SERVING, 5.0, "serving")
            assert _health(address, service) == SERVING
            with grpc.insecure_channel(address) as channel:
                names = ProtoReflectionDescriptorDatabase(channel).get_services()
            assert service in names
            assert "grpc.health.v1.Health" in names


def test_a_router_without_one_of_its_servers_is_not_healthy(checkpoint: Path) -> None:
    with local_mesh(checkpoint) as cluster:
        address = cluster.routers[0].address
        wait_until(lambda: _health(address) == SERVING, 5.0, "serving")

        loop.run(cluster.servers[0].stop())

        wait_until(lambda: _health(address) == NOT_SERVING, 5.0, "not serving")


def test_every_service_is_alive_whether_or_not_it_can_serve(checkpoint: Path) -> None:
    with local_mesh(checkpoint) as cluster:
        for server in cluster.servers:
            loop.run(server.stop())
        router = cluster.routers[0].address
        wait_until(lambda: _health(router) == NOT_SERVING, 5.0, "not serving")

        assert _health(router, LIVENESS) == SERVING
        assert _health(cluster.controller.address, LIVENESS) == SERVING


def test_a_process_whose_event_loop_hangs_takes_connections_and_is_not_alive(
    served: LocalMesh,
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait(30.0)

    loop.shared_loop().call_soon_threadsafe(hang)
    assert hangs.wait(5.0)
    try:
        for address in _addresses(served).values():
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5.0).close()
            with pytest.raises(grpc.RpcError) as caught:
                _health(address, LIVENESS, timeout_s=0.5)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        goes_on.set()
    for address in _addresses(served).values():
        wait_until(lambda a=address: _health(a, LIVENESS) == SERVING, 5.0, "alive again")


def test_load_names_every_moe_layer_before_anything_was_counted(checkpoint: Path) -> None:
    with local_mesh(checkpoint) as cluster, expertmesh.connect(cluster.address) as mesh:
        load = mesh.load()

        for layer in mesh.describe().layers:
            assert load.counts[layer.index].tolist() == [0] * layer.num_experts
            assert load.maxvio[layer.index] == 0.0


@pytest.mark.parametrize(
    "method",
    [
        "RouterService/Describe",
        "RouterService/GetLoad",
        "RouterService/GetStatus",
        "ExpertService/DescribeShard",
        "ControlService/AnnounceServer",
        "ControlService/ReportAssignments",
        "ControlService/ReportExecutions",
        "ControlService/GetClusterLoad",
        "ControlService/SetBalanceMode",
    ],
)
def test_bytes_that_are_no_request_are_an_invalid_argument(served: LocalMesh, method: str) -> None:
    address = _addresses(served)[f"expertmesh.v1.{method.partition('/')[0]}"]
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/expertmesh.v1.{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff", timeout=5.0)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "see the .proto" in caught.value.details()


def test_a_watch_of_garbage_is_an_invalid_argument(served: LocalMesh) -> None:
    with grpc.insecure_channel(served.controller.address) as channel:
        watch = channel.unary_stream("/expertmesh.v1.ControlService/WatchCluster")
        with pytest.raises(grpc.RpcError) as caught:
            next(watch(b"\xff\xff\xff", timeout=5.0))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_client_that_reaches_another_service_is_told_so(served: LocalMesh) -> None:
    with pytest.raises(expertmesh.MismatchError, match="is it that service"):
        expertmesh.connect(served.controller.address)
