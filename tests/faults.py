"""Real faults of a controller's state file. For tests."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from load_controller.store import Store


@contextmanager
def full(store: Store) -> Iterator[None]:
    """No page can be added to the file: SQLITE_FULL at the first statement that needs one."""
    db = store.file._db
    ((most,),) = db.execute("PRAGMA max_page_count")
    ((pages,),) = db.execute("PRAGMA page_count")
    db.execute(f"PRAGMA max_page_count = {pages}")
    endless = iter(lambda: (), None)  # what is free in the pages that are there is taken, too
    with pytest.raises(sqlite3.OperationalError, match="full"):
        db.executemany("INSERT INTO meta VALUES (hex(randomblob(16)), zeroblob(64))", endless)
    assert not db.in_transaction, "a full disk rolls back by itself"
    yield
    db.execute(f"PRAGMA max_page_count = {most}")


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Another process, as it were, holds the file: SQLITE_BUSY at the first statement."""
    other = sqlite3.connect(store.file.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    yield
    other.execute("ROLLBACK")
    other.close()


@contextmanager
def read_only(store: Store) -> Iterator[None]:
    """SQLITE_READONLY, as after a file system was remounted: within the transaction."""
    store.file._db.execute("PRAGMA query_only = 1")
    yield
    store.file._db.execute("PRAGMA query_only = 0")


class FailingAt:
    """A connection whose `number`-th statement from now on fails as a broken disk does.

    `fired` says whether there were so many.
    """

    def __init__(self, db: sqlite3.Connection, number: int) -> None:
        self._db, self._left = db, number
        self.fired = False

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.fired = True
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_IOERR, "SQLITE_IOERR"
            raise error

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """As the connection's; a ROLLBACK is carried out whatever was said."""
        if statement != "ROLLBACK":
            self._count()
        return self._db.execute(statement, *values)

    def executemany(self, statement: str, values: Any) -> sqlite3.Cursor:
        """As the connection's."""
        self._count()
        return self._db.executemany(statement, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


@contextmanager
def failing_at(store: Store, number: int) -> Iterator[FailingAt]:
    """The store's `number`-th statement fails within it."""
    db = store.file._db
    failing = FailingAt(db, number)
    store.file._db = failing  # type: ignore[assignment]
    try:
        yield failing
    finally:
        store.file._db = db


@contextmanager
def small_disk(folder: Path, size: str = "512k") -> Iterator[Callable[..., None]]:
    """A file system of its own at `folder`, of that size; what it gives remounts it with options.

    Needs root. It is unmounted at the end, whatever is still open there.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir(exist_ok=True)

    def mount(*options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True
        )

    mount(f"size={size}")
    try:
        yield lambda *options: mount("remount", f"size={size}", *options)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Writes a file there until the disk is full; remove it to make room again."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for block in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"\0" * block):
                    pass
            except OSError:
                continue
    return filler
