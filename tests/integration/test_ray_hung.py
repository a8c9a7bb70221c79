"""What hangs on Ray is ended and started anew; what is cut off, or takes its time, is not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import expertmesh
from expertmesh import ConfigError, UnavailableError
from expertmesh.config import AutoscaleConfig
from fleet import control, launch
from fleet.cluster import Cluster
from tests.checkpoints import make_checkpoint
from tests.mesh import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
_HUNG_S = 4.0  # shorter than the default, so that a test is
_BACK_S = 120.0  # lost, silent, ended, started and loaded, on a machine that does other things
_SERVER = "shard0-replica0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


@pytest.fixture(scope="module")
def our_ray() -> Iterator[None]:
    ray.shutdown()
    ray.init(
        address="local", num_cpus=2, resources={"expert_slot": 1}, include_dashboard=False,
        log_to_driver=False,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(our_ray: None, checkpoint: tuple[Path, torch.nn.Module]) -> Iterator[Cluster]:
    with launch(checkpoint[0], shards=1, replicas=2, hung_after_s=_HUNG_S) as running:
        yield running


def _get(ref: Any) -> Any:
    return ray.get(ref, timeout=_BACK_S)  # a failure, not a wait for ever, where it still hangs


def _state(cluster: Cluster, name: str = _SERVER) -> str:
    fleet = control.get_fleet(cluster.controller_address)
    return next(s.server.state for s in fleet.servers if s.server.server_id == name)


def _holds(condition: Callable[[], bool]) -> Callable[[], bool]:
    """The condition, false while a service that it asks is away."""

    def asked() -> bool:
        try:
            return condition()
        except (UnavailableError, expertmesh.DeadlineError):
            return False

    return asked


def _answers_are_right(cluster: Cluster, model: torch.nn.Module) -> None:
    with expertmesh.connect(cluster.address, timeout=60.0) as mesh:
        hidden = torch.randn(9, mesh.describe().hidden_size)
        output = mesh.forward(hidden, 1, timeout=60.0)
    with torch.no_grad():
        expected = model.model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def _stop_process(actor: Any, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def _stop_loop(actor: Any, pid: int) -> None:
    """The event loop stands still, and everything else of the process goes on."""

    def hang(_: Any) -> None:
        from expertmesh.rpc import loop

        loop.shared_loop().call_soon_threadsafe(time.sleep, 1e6)

    _get(actor.__ray_call__.remote(hang))


@pytest.mark.parametrize("hang", [_stop_process, _stop_loop])
def test_a_server_that_hangs_is_ended_comes_back_and_answers_right(
    cluster: Cluster, checkpoint: tuple[Path, torch.nn.Module],
    caplog: pytest.LogCaptureFixture, hang: Callable[[Any, int], None],
) -> None:  # fmt: skip
    assert cluster.watch is not None
    before = cluster.watch.restarts.copy()
    actor = cluster.servers[_SERVER]
    pid = _get(actor.pid.remote())

    hang(actor, pid)
    wait_until(_holds(lambda: _state(cluster) == "lost"), _BACK_S, "lost")
    _answers_are_right(cluster, checkpoint[1])  # of the replica
    wait_until(_holds(lambda: _state(cluster) == "ready"), _BACK_S, "ready again")

    assert _get(actor.pid.remote()) != pid
    assert not Path(f"/proc/{pid}").exists()
    assert cluster.watch.restarts - before == {_SERVER: 1}
    assert f"expert server {_SERVER} has answered nothing for 4 s" in caplog.text
    assert "it is ended and started anew" in caplog.text
    wait_until(_holds(lambda: cluster.status().ready), _BACK_S, "ready")
    _answers_are_right(cluster, checkpoint[1])


def test_a_supervised_server_that_hangs_is_started_anew_under_its_name(
    our_ray: None, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    with launch(
        checkpoint[0], shards=1, ray_address="auto", cpus_per_server=0.1, hung_after_s=_HUNG_S,
        autoscale=AutoscaleConfig(min_replicas=1, max_replicas=1),
    ) as cluster:  # fmt: skip
        assert cluster.watch is not None
        pid = _get(cluster.servers[_SERVER].pid.remote())
        os.kill(pid, signal.SIGSTOP)
        wait_until(_holds(lambda: _state(cluster) == "lost"), _BACK_S, "lost")
        wait_until(_holds(lambda: _state(cluster) == "ready"), _BACK_S, "ready again")
        wait_until(_holds(lambda: cluster.status().ready), _BACK_S, "ready")
        names = list(cluster.servers)
        _answers_are_right(cluster, checkpoint[1])

    assert cluster.watch.restarts == {_SERVER: 1}
    assert names == [_SERVER]
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("service", ["router 0", "load controller"])
def test_a_router_or_controller_that_hangs_is_ended_and_comes_back_at_its_address(
    cluster: Cluster, checkpoint: tuple[Path, torch.nn.Module],
    caplog: pytest.LogCaptureFixture, service: str,
) -> None:  # fmt: skip
    assert cluster.watch is not None
    before = cluster.watch.restarts.copy()
    actor = cluster.controller if service == "load controller" else cluster.routers[0]
    pid = _get(actor.pid.remote())

    _stop_process(actor, pid)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), _BACK_S, "ended")
    wait_until(_holds(lambda: cluster.status().ready), _BACK_S, "ready")
    wait_until(_holds(lambda: _state(cluster) == "ready"), _BACK_S, "known")

    assert cluster.watch.restarts - before == {service: 1}
    assert f"the {service} has answered nothing for 4 s: it is ended" in caplog.text
    _answers_are_right(cluster, checkpoint[1])


def test_a_server_that_only_the_controller_does_not_hear_serves_on(
    cluster: Cluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    assert cluster.watch is not None
    before = cluster.watch.restarts.copy()
    actor = cluster.servers[_SERVER]
    pid = _get(actor.pid.remote())

    def cut(host: Any) -> None:
        from expertmesh.rpc import loop

        loop.run(host._server._announcer.close())  # nothing gets through from now on

    _get(actor.__ray_call__.remote(cut))
    wait_until(_holds(lambda: _state(cluster) == "lost"), _BACK_S, "lost")
    looks = cluster.watch.looks
    wait_until(lambda: cluster.watch.looks > looks + 3 * _HUNG_S, _BACK_S, "looked at for long")

    assert cluster.watch.restarts == before
    assert _get(actor.pid.remote()) == pid
    _answers_are_right(cluster, checkpoint[1])
    os.kill(pid, signal.SIGKILL)  # for the tests after this one
    wait_until(_holds(lambda: _state(cluster) == "ready"), _BACK_S, "ready again")


def test_a_server_that_is_loading_for_long_is_left_alone(
    cluster: Cluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    """Ray starts a server anew that takes its time in the constructor: known, lost and silent."""
    assert cluster.watch is not None
    before = cluster.watch.restarts.copy()
    path, away = checkpoint[0] / "config.json", checkpoint[0] / "config.fifo"
    actor = cluster.servers[_SERVER]
    pid = _get(actor.pid.remote())
    content = path.read_bytes()
    path.rename(away)
    os.mkfifo(path)  # who opens it waits, as on a file system that hangs
    try:
        os.kill(pid, signal.SIGKILL)
        wait_until(_holds(lambda: _state(cluster) == "lost"), _BACK_S, "lost")
        looks = cluster.watch.looks
        wait_until(lambda: cluster.watch.looks > looks + 3 * _HUNG_S, _BACK_S, "looked at for long")
        restarts = cluster.watch.restarts.copy()
    finally:
        writer = os.open(path, os.O_RDWR)  # for a reader too, so that it does not wait for one
        path.unlink()
        os.write(writer, content)
        os.close(writer)
        away.rename(path)
    wait_until(_holds(lambda: _state(cluster) == "ready"), _BACK_S, "ready again")

    assert restarts == before
    _answers_are_right(cluster, checkpoint[1])


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan"), "30", True, None])
def test_what_is_no_time_is_refused(checkpoint: tuple[Path, torch.nn.Module], value: Any) -> None:
    with pytest.raises(ConfigError, match=r"hung_after_s is .*, expected seconds"):
        launch(checkpoint[0], hung_after_s=value)
