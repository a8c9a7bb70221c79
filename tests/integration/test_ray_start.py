"""Ray that cannot be started here: why, in words, and nothing of it left running."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.node import Node

from expertmesh import ConfigError
from expertmesh.rpc import engine
from fleet import ray_session

pytestmark = pytest.mark.ray


def test_what_had_started_ends_when_ray_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    before = set(psutil.Process().children())
    # Ray refuses a debugger without tmux when it comes to its raylet, after all else has started.
    monkeypatch.setenv("RAY_RAYLET_GDB", "1")

    with pytest.raises(ConfigError) as failure:
        ray_session.connect(None)

    said = str(failure.value)
    assert said.startswith("cannot start Ray on this machine: ")
    logs = Path(said.rpartition("Ray's logs are in ")[2])
    assert (logs / "gcs_server.out").exists(), "Ray's first process had started"
    assert set(psutil.Process().children()) == before
    assert not ray.is_initialized()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_had_started_ends_when_the_start_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    ray.shutdown()
    before = set(psutil.Process().children())
    handler = signal.getsignal(signal.SIGTERM)
    started: list[psutil.Process] = []

    def interrupted(*_: object, **__: object) -> None:
        started.extend(set(psutil.Process().children()) - before)
        raise error

    monkeypatch.setattr(Node, "start_raylet", interrupted)

    with pytest.raises(error):
        ray_session.connect(None)

    assert started, "Ray's first process had started"
    assert set(psutil.Process().children()) == before
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not ray.is_initialized()


def test_who_imported_grpc_first_is_told_what_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_RAYLET_GDB", "1")
    monkeypatch.setattr(engine, "APPLIED", False)

    with pytest.raises(ConfigError, match=r"grpc was imported before expertmesh: .*\nRay's logs"):
        ray_session.connect(None)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            {
                "raylet.err": "[2026-11-29 22:58:15,381 C 7 7] (raylet) main.cc:1: Check failed\n",
                "raylet.out": "[2026-11-29 22:58:15,380 I 7 7] (raylet) main.cc:2: all is well\n",
            },
            "[2026-11-29 22:58:15,381 C 7 7] (raylet) main.cc:1: Check failed",
        ),
        ({"raylet.err": "", "raylet.out": "1\n2\n3\n4\n5\n6\n"}, "2\n3\n4\n5\n6"),
        ({}, "it said nothing"),
    ],
)
def test_its_first_errors_are_told_of_a_process_that_ended_else_its_last_lines(
    tmp_path: Path, said: dict[str, str], told: str
) -> None:
    for name, text in said.items():
        (tmp_path / name).write_text(text)

    assert ray_session._last_words(tmp_path, "raylet") == told
