"""What services advertise can be reached by others, and what is no address ends a start."""

from __future__ import annotations

import ipaddress
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import expert_service.__main__
import expertmesh
import router_service.__main__
from expert_service.server import ExpertServer, Placing
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import RpcConfig
from expertmesh.errors import ConfigError, InvalidRequestError
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.placement import initial_parts
from expertmesh.rpc import loop
from expertmesh.rpc.address import parse_address
from expertmesh.rpc.own_address import advertised_host
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2
from load_controller.server import ControllerServer
from router_service.server import RouterServer, open_model
from tests.checkpoints import make_checkpoint
from tests.mesh import LOCAL, wait_until

QUICK = RpcConfig(drain_s=1.0)  # of every interface, as services are by themselves


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("addresses") / "checkpoint"
    make_checkpoint("olmoe", folder)
    return folder


@pytest.fixture(params=["::1", "0.0.0.0", "::", "127.0.0.1"])
def cluster(
    request: pytest.FixtureRequest, path: Path, tmp_path: Path
) -> Iterator[tuple[ControllerServer, ExpertServer, RouterServer]]:
    """One of each, as their `--host` was given."""
    host = request.param

    async def start() -> tuple[ControllerServer, ExpertServer, RouterServer]:
        controller = ControllerServer(
            tmp_path / "state.sqlite", host=host, rpc=QUICK, metrics_port=0
        )
        await controller.start()
        checkpoint = Checkpoint.open(path)
        server = ExpertServer(
            checkpoint,
            initial_parts(checkpoint.spec, 1)[0],
            Placing(server_id="s0", host=host, controller=controller.address),
            rpc=QUICK,
        )
        await server.start()
        router = RouterServer(
            open_model(path),
            router_id="r0",
            controller=controller.address,
            host=host,
            rpc=QUICK,
        )
        await router.start()
        return controller, server, router

    async def stop() -> None:
        for service in (router, server, controller):
            await service.stop()

    controller, server, router = loop.run(start())
    try:
        yield controller, server, router
    finally:
        loop.run(stop())


def test_what_is_advertised_is_reached_data_connections_and_metrics_included(
    cluster: tuple[ControllerServer, ExpertServer, RouterServer],
) -> None:
    controller, server, router = cluster
    advertised = [controller.address, server.endpoint, router.address, controller.metrics_address]

    for each in advertised:
        host = ipaddress.ip_address(parse_address(each).host)
        assert not host.is_unspecified
    with expertmesh.connect(router.address) as mesh:
        wait_until(lambda: mesh.status().ready, 20.0, "ready")
        answer = mesh.forward(torch.randn(3, mesh.describe().hidden_size), 0)
        wait_until(lambda: mesh.status().servers[0].transport == "tcp", 5.0, "on TCP")
        assert mesh.status().servers[0].endpoint == server.endpoint
    assert answer.isfinite().all()
    with urllib.request.urlopen(f"http://{controller.metrics_address}/metrics") as page:
        assert b"expertmesh_controller_servers" in page.read()


def test_every_interface_takes_both_families(
    cluster: tuple[ControllerServer, ExpertServer, RouterServer],
) -> None:
    controller, _, router = cluster

    for service in (controller.address, router.address, controller.metrics_address):
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, parse_address(service).port), timeout=5.0).close()


def test_a_machine_without_a_way_out_advertises_itself() -> None:
    """In a network namespace of its own, which has nothing but a loopback interface."""
    code = (
        "from expertmesh.rpc.own_address import advertised_host as of;"
        "print(of('0.0.0.0'), of('::'), of('0.0.0.0', '10.1.2.3:50050'), of('10.0.0.5'))"
    )
    done = subprocess.run(
        ["unshare", "--net", "--map-root-user", sys.executable, "-c", code],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip

    assert done.stdout.split() == ["127.0.0.1", "127.0.0.1", "127.0.0.1", "10.0.0.5"]


@pytest.mark.parametrize("host", ["", "10.0.0.5:50051", "http://10.0.0.5", "[::1]:50051", "a b"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, path: Path, host: str) -> None:
    async def start(make: Callable[[], object]) -> object:
        return make()

    makes: list[Callable[[], object]] = [
        lambda: ControllerServer(tmp_path / "state.sqlite", host=host, rpc=LOCAL),
        lambda: RouterServer(open_model(path), router_id="r", controller="c:1", host=host),
        lambda: ExpertServer(Checkpoint.open(path), [], Placing(server_id="s", host=host)),
    ]
    for make in makes:
        with pytest.raises(ConfigError, match="expected a host without a port"):
            loop.run(start(make))


NO_CONTROLLERS = ["127.0.0.1", "http://127.0.0.1:50050", "::1", "::1:50050", "127.0.0.1:0", "a:b"]
SERVICES: dict[str, Callable[[list[str]], int]] = {
    "router": router_service.__main__.main,
    "expert server": expert_service.__main__.main,
}


@pytest.mark.parametrize("controller", NO_CONTROLLERS)
@pytest.mark.parametrize("main", SERVICES.values(), ids=SERVICES)
def test_a_controller_that_is_no_address_ends_the_start_in_one_line(
    path: Path, capfd: pytest.CaptureFixture[str], main: Callable[[list[str]], int], controller: str
) -> None:
    code = main([str(path), "--controller", controller])
    printed = capfd.readouterr()

    assert (code, printed.out) == (1, "")
    assert printed.err.startswith(f"error: --controller is {controller!r}, expected host:port")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("controller", NO_CONTROLLERS)
def test_the_services_themselves_refuse_it_too(path: Path, controller: str) -> None:
    async def router() -> object:
        return RouterServer(open_model(path), router_id="r", controller=controller, host="h")

    async def server() -> object:
        placing = Placing(server_id="s", host="h", controller=controller)
        return ExpertServer(Checkpoint.open(path), [], placing)

    for make in (router, server):
        with pytest.raises(ConfigError, match=r"controller is .* expected host:port"):
            loop.run(make())


@pytest.mark.parametrize("endpoint", ["10.0.0.5", "::1:50051", "http://10.0.0.5:50051"])
def test_what_nobody_could_connect_to_is_not_passed_on(tmp_path: Path, endpoint: str) -> None:
    async def announce() -> None:
        server = ControllerServer(tmp_path / "state.sqlite", host="127.0.0.1", rpc=LOCAL)
        controller = server.controller
        with pytest.raises(InvalidRequestError, match=r"endpoint is .* expected host:port"):
            controller.announce(
                pb.AnnounceServerRequest(
                    server=router_pb2.ServerStatus(
                        server_id="s", incarnation="i", endpoint=endpoint, state="ready"
                    ),
                    protocol_version=PROTOCOL_VERSION,
                    checkpoint_digest="digest",
                ),
                now=0.0,
            )
        with pytest.raises(InvalidRequestError, match=r"endpoint is .* expected host:port"):
            controller.add_router(pb.WatchClusterRequest(router_id="r", endpoint=endpoint))
        assert not controller.directory().servers
        assert not controller.directory().routers

    loop.run(announce())


def test_every_interface_is_advertised_as_the_address_towards_the_controller() -> None:
    """Where there are several interfaces, the one on whose network the others are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("198.51.100.1", 9))
        own = probe.getsockname()[0]

    assert advertised_host("0.0.0.0", "198.51.100.1:50050") == own
    assert advertised_host("0.0.0.0", "127.0.0.1:50050") == own, "others may not be on this machine"
    assert advertised_host("0.0.0.0", "no.such.name.invalid:50050") == own
