"""A cluster that ends, or does not start: every step is taken, and nothing is left behind."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch

import expertmesh
import fleet.cluster
from expertmesh import ConfigError
from fleet import launch, state
from fleet.cluster import Cluster
from tests.checkpoints import make_checkpoint
from tests.mesh import wait_until

pytestmark = pytest.mark.ray
_GONE_S = 30.0
starting = importlib.import_module("fleet.launch")  # its name in `fleet` is a function
_SESSION = "EXPERTMESH_TEST_SESSION"
_ACTORS = ("LoadControllerActor", "RouterActor", "ExpertServerActor", "SupervisorActor")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    return path


@pytest.fixture(scope="module")
def our_ray() -> Iterator[None]:
    """A Ray of the caller's own, which no cluster may end."""
    ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files and notes of this test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def _actors() -> list[str]:
    """Command lines of the actors that this test's Ray runs."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            ours = process.environ().get(_SESSION) == os.environ[_SESSION]
        except psutil.Error:
            continue
        if ours and line.startswith("ray::") and any(name in line for name in _ACTORS):
            found.append(line)
    return found


def _nothing_is_left(places: Path) -> None:
    wait_until(lambda: _actors() == [], _GONE_S, "every actor ended")
    assert ray.is_initialized(), "Ray is the caller's"
    cpus = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == cpus, _GONE_S, "CPUs given back")
    assert [each.name for each in places.iterdir() if each.name.startswith("expertmesh-")] == []
    assert state.recall() is None


class _Broken:
    """An actor's method that cannot be called."""

    def remote(self) -> None:
        raise OSError("injected")


def _break_stop(actor: Any) -> None:
    actor.stop = _Broken()


def _raise_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    done = getattr(owner, name)

    def then_fail(*arguments: Any, **options: Any) -> None:
        done(*arguments, **options)
        raise OSError("injected")

    monkeypatch.setattr(owner, name, then_fail)


CLOSING: dict[str, Callable[[pytest.MonkeyPatch, Cluster], None]] = {
    "stopping a router": lambda _, cluster: _break_stop(cluster.routers[0]),
    "stopping a server": lambda _, cluster: _break_stop(cluster.servers["shard0-replica0"]),
    "stopping the controller": lambda _, cluster: _break_stop(cluster.controller),
    "finding later servers": lambda patch, cluster: patch.setattr(
        cluster, "roster", SimpleNamespace(actors=_Broken().remote)
    ),
    "forgetting": lambda patch, _: _raise_after(patch, state, "forget"),
    "leaving Ray": lambda patch, cluster: _raise_after(patch, cluster._session, "leave"),
    "removing the folder": lambda patch, _: _raise_after(patch, shutil, "rmtree"),
}


@pytest.mark.parametrize("fault", CLOSING.values(), ids=CLOSING)
def test_a_step_of_closing_that_fails_keeps_no_other_from_being_taken(
    our_ray: None, checkpoint: Path, places: Path, monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch, Cluster], None],
) -> None:  # fmt: skip
    cluster = launch(checkpoint, shards=1)
    assert len(_actors()) == 3
    with monkeypatch.context() as patch:
        fault(patch, cluster)
        with pytest.raises(OSError, match="injected"):
            cluster.close()
    cluster.close()  # again: nothing to be done
    assert cluster._session._users == 0
    del cluster

    _nothing_is_left(places)


STARTING = {
    "the folder": (Cluster, "make_folder"),
    "the plan": (starting, "_plan"),
    "the services": (starting, "_start_services"),
    "the servers": (starting, "start_servers"),
    "the wait": (starting, "wait_ready"),
    "the note": (starting, "_remember"),
}


@pytest.mark.parametrize(("owner", "name"), STARTING.values(), ids=STARTING)
def test_a_step_of_starting_that_fails_leaves_nothing_and_is_the_error_that_is_told(
    our_ray: None, checkpoint: Path, places: Path, monkeypatch: pytest.MonkeyPatch,
    owner: Any, name: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        _raise_after(patch, owner, name)

        def fail(*_: object) -> None:
            raise ValueError("while closing, too")

        patch.setattr(fleet.cluster, "_drain", fail)
        with pytest.raises(OSError, match="injected"):
            launch(checkpoint, shards=1)

    assert "while closing, too" in caplog.text
    _nothing_is_left(places)


def test_a_state_folder_that_cannot_be_written_ends_no_start_and_no_closing(
    our_ray: None, checkpoint: Path, places: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(places))
    (places / ".local").touch()

    with launch(checkpoint, shards=1) as cluster, expertmesh.connect(cluster.address) as mesh:
        output = mesh.forward(torch.randn(3, mesh.describe().hidden_size), 1)

    assert output.isfinite().all()
    assert f"with --router {cluster.address}" in caplog.text
    (places / ".local").unlink()
    _nothing_is_left(places)


def test_a_cluster_is_launched_and_closed_where_an_event_loop_runs_already(
    our_ray: None, checkpoint: Path, places: Path
) -> None:
    """As in a notebook."""

    async def cell() -> torch.Tensor:
        with launch(checkpoint, shards=1) as cluster:
            async with expertmesh.connect_async(cluster.address) as mesh:
                return await mesh.forward(torch.randn(3, mesh.describe().hidden_size), 1)

    assert asyncio.run(cell()).isfinite().all()
    _nothing_is_left(places)


def test_a_cluster_whose_ray_somebody_has_ended_is_closed_without_starting_another(
    checkpoint: Path, places: Path
) -> None:
    ray.shutdown()
    cluster = launch(checkpoint, shards=1)
    ray.shutdown()

    cluster.close()

    assert not ray.is_initialized()
    assert state.recall() is None
    wait_until(lambda: _actors() == [], _GONE_S, "every actor ended")


def test_a_temporary_folder_that_cannot_be_made_leaves_nothing_running(
    checkpoint: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.shutdown()
    monkeypatch.setattr(tempfile, "tempdir", str(places / "not-there"))

    with pytest.raises(ConfigError, match="cannot make a folder for temporary files"):
        launch(checkpoint, shards=1)

    assert not ray.is_initialized()
