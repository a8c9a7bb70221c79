"""The note of the last cluster: written where it can be, and never trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from expertmesh import ConfigError
from fleet import state
from fleet.cli.main import main

_CLUSTER = state.LastCluster(
    address="127.0.0.1:50051,127.0.0.1:50052", pid=os.getpid(), started="77", command="serve"
)
_GOOD = asdict(_CLUSTER)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "expertmesh").mkdir()
    return tmp_path / "expertmesh"


def _note(folder: Path, content: bytes) -> None:
    (folder / "last-cluster.json").write_bytes(content)


def test_a_cluster_is_remembered_until_it_is_forgotten(folder: Path) -> None:
    state.remember(_CLUSTER)
    assert state.recall() == _CLUSTER
    state.forget("127.0.0.1:1")
    assert state.recall() == _CLUSTER, "that was another one"
    state.forget(_CLUSTER.address)
    assert state.recall() is None
    assert list(folder.iterdir()) == []


GARBLED = {
    "empty": b"",
    "truncated": json.dumps(_GOOD).encode()[:-5],
    "binary": b"\xff\xfe\x00\x01",
    "no object": b"[1, 2]",
    "null": b"null",
    "nested": b"[" * 100_000,
    "another release's, with more": json.dumps({**_GOOD, "host": "a"}).encode(),
    "another release's, with less": b'{"address": "127.0.0.1:1"}',
    "of somebody else": b'{"name": "vim", "pid": 3}',
    "a pid that is everybody's": json.dumps({**_GOOD, "pid": -1}).encode(),
    "a pid that is our whole group's": json.dumps({**_GOOD, "pid": 0}).encode(),
    "a pid in words": json.dumps({**_GOOD, "pid": "12"}).encode(),
    "a pid that is a truth": json.dumps({**_GOOD, "pid": True}).encode(),
    "a process that never started": json.dumps({**_GOOD, "started": ""}).encode(),
    "an address with a scheme": json.dumps({**_GOOD, "address": "http://a:1"}).encode(),
    "an address that is none": json.dumps({**_GOOD, "address": 7}).encode(),
    "a command that is none": json.dumps({**_GOOD, "command": None}).encode(),
}


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED)
@pytest.mark.parametrize("command", ["status", "down"])
def test_a_garbled_note_is_an_error_that_says_what_to_do_and_signals_nobody(
    folder: Path, content: bytes, command: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _note(folder, content)
    signalled: list[object] = []
    monkeypatch.setattr(os, "kill", lambda *call: signalled.append(call))

    code = main([command])

    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith(f"error: {folder / 'last-cluster.json'} does not name a cluster (")
    assert "remove it" in said
    assert signalled == []


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED)
def test_a_garbled_note_keeps_no_cluster_from_ending_or_from_being_noted(
    folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    _note(folder, content)

    state.forget(_CLUSTER.address)
    assert "the note of the last cluster stays: " in caplog.text
    state.remember(_CLUSTER)

    assert state.recall() == _CLUSTER


@pytest.mark.parametrize("broken", ["a file for a folder", "a folder for the file"])
@pytest.mark.parametrize("command", ["status", "down"])
def test_a_note_that_cannot_be_read_is_an_error_that_says_why(
    folder: Path, broken: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if broken == "a file for a folder":
        folder.rmdir()
        folder.touch()
    else:
        (folder / "last-cluster.json").mkdir()

    code = main([command])

    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith(f"error: {folder / 'last-cluster.json'} cannot be read (")
    assert "--router HOST:PORT" in said


def test_a_cluster_that_cannot_be_noted_is_told_in_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.rmdir()
    folder.touch()

    state.remember(_CLUSTER)
    state.forget(_CLUSTER.address)

    assert f"with --router {_CLUSTER.address}" in caplog.text
    assert "the note of the last cluster stays" in caplog.text


def test_a_note_that_is_only_half_written_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)

    state.remember(_CLUSTER)

    assert list(folder.iterdir()) == []
    assert "No space left" in caplog.text


def test_a_user_without_a_home_can_start_clusters_and_is_told_how_to_note_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)

    state.remember(_CLUSTER)

    assert "set HOME, or XDG_STATE_HOME" in caplog.text
    with pytest.raises(ConfigError, match="set HOME, or XDG_STATE_HOME"):
        state.recall()


def test_a_relative_state_folder_is_ignored_as_the_specification_asks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert state.state_folder() == tmp_path / ".local" / "state" / "expertmesh"


def test_down_does_not_end_what_another_user_has_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        state.remember(
            state.LastCluster(
                address="127.0.0.1:50051", pid=other.pid, started=state.started(other.pid),
                command="serve",
            )
        )  # fmt: skip
        monkeypatch.setattr(os, "kill", refuse)
        code = main(["down"])
        assert other.stdin is not None
        other.stdin.close()

    assert code == 1
    assert f"process {other.pid} of another user" in capsys.readouterr().err
