"""Proxies that the environment names are not used, one that the caller names is; slow lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import expertmesh
from expertmesh import InvalidRequestError, UnavailableError
from fleet import control
from fleet.external import check_controller
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh
from tests.proxy import Proxy, connect_proxy, names_a_dead_proxy, slow_line

_COMMAND_S = 180.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    return path


@pytest.fixture(scope="module")
def mesh(checkpoint: Path) -> Iterator[LocalMesh]:
    with local_mesh(checkpoint) as running:
        running.wait()
        yield running


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with connect_proxy() as running:
        yield running


def _use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_cluster_on_one_machine_starts_beside_proxies_that_the_environment_names(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, names_a_dead_proxy())

    with local_mesh(checkpoint, routers=2) as running:
        running.wait()
        with expertmesh.connect(running.address, timeout=5.0) as mesh:
            hidden = torch.randn(3, mesh.describe().hidden_size)
            output = mesh.forward(hidden, 1)
            mesh.load()
        check_controller(running.controller.address)
        control.get_fleet(running.controller.address)

    assert output.isfinite().all()


def test_a_proxy_of_the_environment_is_asked_for_nothing(
    mesh: LocalMesh, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(monkeypatch, dict.fromkeys(names_a_dead_proxy(), proxy.url) | {"no_proxy": ""})

    with expertmesh.connect(mesh.address) as connected:
        connected.status()
    control.get_fleet(mesh.controller.address)

    assert proxy.asked == []


def test_a_proxy_that_the_caller_names_carries_every_byte(mesh: LocalMesh, proxy: Proxy) -> None:
    address = mesh.routers[0].address
    with expertmesh.connect(address) as direct:
        hidden = torch.randn(600, direct.describe().hidden_size)
        expected = direct.forward(hidden, 1)
    with expertmesh.connect(address, proxy=proxy.url) as through:
        output = through.forward(hidden, 1)
        (link,) = through._mesh._links.values()
        assert link._stream is not None
        way = link._stream.transport

    torch.testing.assert_close(output, expected)
    assert set(proxy.asked) == {f"CONNECT {address} HTTP/1.1"}
    assert proxy.tunnelled > 2 * hidden.nbytes, "rows there, and answers back"
    assert way == "grpc", "a data connection would go past the proxy"


def test_a_proxy_is_told_who_asks(mesh: LocalMesh, proxy: Proxy) -> None:
    named = proxy.url.replace("http://", "http://user:secret@")

    with expertmesh.connect(mesh.routers[0].address, proxy=named) as through:
        through.status()

    assert "Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=" in proxy.asked


def test_a_proxy_that_is_not_there_is_an_error_in_time(mesh: LocalMesh) -> None:
    began = time.monotonic()

    with pytest.raises(UnavailableError):
        expertmesh.connect(mesh.routers[0].address, timeout=0.5, proxy="http://127.0.0.1:9")

    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    "proxy",
    ["127.0.0.1:3128", "socks5://127.0.0.1:1080", "http://proxy", "http://:3128", "http://a:b:c",
     "https://proxy:3128", "http://proxy:3128/path", "http://user:secret@", 3128, None],
)  # fmt: skip
def test_what_is_no_proxy_is_refused_at_once_and_no_password_repeated(proxy: object) -> None:
    with pytest.raises(InvalidRequestError, match="expected http://host:port") as caught:
        expertmesh.connect("127.0.0.1:1", proxy=proxy)  # type: ignore[arg-type]

    assert caught.value.field == "proxy"
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:50051", "grpc://127.0.0.1:50051", "dns:///router:50051", "127.0.0.1",
     "10.0.5:1", "127.0.0.1:50051,http://127.0.0.1:50051", "", ","],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    began = time.monotonic()

    with pytest.raises(InvalidRequestError, match="expected host:port") as caught:
        expertmesh.connect(address, timeout=30.0)

    assert caught.value.field == "address"
    assert time.monotonic() - began < 5.0


def test_one_router_has_one_name(mesh: LocalMesh) -> None:
    port = mesh.routers[0].address.rpartition(":")[2]

    with expertmesh.connect(f"localhost:{port}, LOCALHOST:{port},127.0.0.1:{port}") as connected:
        assert len(connected._mesh._links) == len(mesh.routers)


def test_a_command_reaches_what_is_at_the_end_of_a_slow_line_at_once(mesh: LocalMesh) -> None:
    """A round trip of 300 ms: nothing is said before the second one is over."""
    with slow_line(mesh.controller.address, 0.15) as address:
        fleet = control.get_fleet(address)

    assert len(fleet.servers) == len(mesh.servers)


@pytest.mark.ray
def test_launch_and_the_commands_work_beside_a_proxy_that_is_dead(
    checkpoint: Path, tmp_path: Path
) -> None:
    """As on a machine of a company: variables in every shell, and no exception for this host."""
    environment = {**os.environ, **names_a_dead_proxy(), "XDG_STATE_HOME": str(tmp_path)}

    def command(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fleet.cli", *arguments, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def said(*arguments: str) -> tuple[int, dict[str, object]]:
        process = command(*arguments)
        out, _ = process.communicate(timeout=_COMMAND_S)
        return process.returncode, json.loads(out)

    with command("serve", str(checkpoint), "--shards", "1", "--port", "0") as serve:
        assert serve.stdout is not None
        line = serve.stdout.readline()
        assert line, serve.communicate()[1]
        with expertmesh.connect(json.loads(line)["address"]) as mesh:
            output = mesh.forward(torch.randn(3, mesh.describe().hidden_size), 1)
        status_code, status = said("status")
        rebalance_code, _ = said("rebalance")
        down_code, _ = said("down")
        serve.communicate(timeout=_COMMAND_S)

    assert output.isfinite().all()
    assert (status_code, status["ready"]) == (0, True)
    assert (rebalance_code, down_code, serve.returncode) == (0, 0, 0)
