"""State files that cannot be used are refused in one line, and left as they were."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from expertmesh.errors import ConfigError
from load_controller.__main__ import main
from load_controller.store import Store
from tests import faults


def _damaged(path: Path) -> Path:
    store = Store(path)
    for number in range(200):
        store.set_meta(f"fact {number}", "x" * 200)
    store.close()
    raw = bytearray(path.read_bytes())
    raw[4096 * 2 :] = bytes(range(256)) * ((len(raw) - 4096 * 2) // 256)
    path.write_bytes(raw)
    return path


def _of_another_program(path: Path) -> Path:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.close()
    return path


def _garbage(path: Path) -> Path:
    path.write_bytes(b"no database at all, and long enough for a header" * 40)
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _held(path: Path) -> Path:
    Store(path).close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    _HOLDERS.append(holder)
    return path


_HOLDERS: list[sqlite3.Connection] = []
UNUSABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a folder": (_folder, "must be a file"),
    "in no folder": (lambda path: path / "nowhere", "in a folder that is there and"),
    "garbage": (_garbage, "no SQLite database: name another file"),
    "another program's": (_of_another_program, "of another program"),
    "damaged": (_damaged, "damaged"),
    "held by another process": (_held, "another process holds its lock"),
}


@pytest.mark.parametrize(("make", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], Path], said: str
) -> None:
    path = make(tmp_path / "state.sqlite")
    with pytest.raises(ConfigError, match=said) as caught:
        Store(path)

    code = main(["--state", str(path)])
    printed = capfd.readouterr()
    for holder in _HOLDERS:
        holder.close()
    _HOLDERS.clear()

    assert str(path) in caught.value.message
    assert (code, printed.out) == (1, "")
    assert printed.err == f"error: {caught.value.message}\n"


def test_another_programs_database_is_left_as_it_was(tmp_path: Path) -> None:
    path = _of_another_program(tmp_path / "places.sqlite")
    before = path.read_bytes()

    with pytest.raises(ConfigError):
        Store(path)

    assert path.read_bytes() == before


def test_a_read_only_file_system_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with faults.small_disk(disk) as remount:
        Store(disk / "state.sqlite").close()
        remount("ro")
        with pytest.raises(ConfigError, match="can be written"):
            Store(disk / "state.sqlite")
