"""One SQLite file, written in transactions, and what to say while it cannot be written.

A disk that is full, a lock that another process holds, a file system that went read-only: each is
an `UnavailableError` that says so and leaves nothing half written, whoever asked tries again, and
all goes on when there is room again. The event loop never waits: not for a lock, and not for a disk
that has just failed.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from expertmesh.errors import ConfigError, UnavailableError

_log = logging.getLogger(__name__)
_LOCK_S = 0.02  # the event loop stands still meanwhile; a backup's lock is over by the next try
_PAUSE_S = 0.5  # after a failure nothing is tried for so long, whoever asks
_PROBE_BYTES = 1 << 18  # a report of 58 layers of 256 experts needs as much
_MEMORY = ":memory:"
_HINTS = {
    sqlite3.SQLITE_FULL: "make room on its disk",
    sqlite3.SQLITE_BUSY: "another process holds its lock: end that",
    sqlite3.SQLITE_LOCKED: "another process holds its lock: end that",
    sqlite3.SQLITE_READONLY: "make the file, its folder and its file system writable",
    sqlite3.SQLITE_PERM: "make the file and its folder writable",
    sqlite3.SQLITE_CANTOPEN: "it must be a file, in a folder that is there and can be written",
    sqlite3.SQLITE_IOERR: "look at its disk, and at quotas; it must be a local one",
    sqlite3.SQLITE_CORRUPT: "it is damaged: see docs/operations.md",
    sqlite3.SQLITE_NOTADB: "it is no SQLite database: name another file, which is made",
}


class StateFile:
    """An open file. Used from one thread."""

    def __init__(
        self, path: str | Path, schema: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Opens the file, or makes it with the tables of `schema`; ":memory:" keeps nothing.

        Raises ConfigError where it cannot be read or written, or is not ours.
        """
        self.path = str(path)
        self.failures = 0  # transactions that could not be written since the start
        self._clock = clock
        self._problem = ""
        self._closed_until = 0.0
        try:
            self._db = sqlite3.connect(
                path, timeout=_LOCK_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._open(schema)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.Error as error:
            raise ConfigError(f"the state file {self._said(error)}") from None
        self._inode = self._found_inode()

    def _open(self, schema: str) -> None:
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
        if tables and "meta" not in tables:
            raise ConfigError(
                f"the state file {self.path} is the database of another program: name another "
                "file, which is made"
            )
        # WAL with NORMAL survives the death of the process at any instant: what we promise.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA temp_store = MEMORY")  # no other disk can be full for us
        self._db.execute("BEGIN IMMEDIATE")  # also a file that is only read would open
        self._db.execute("COMMIT")
        self._db.executescript(schema)
        ((found,),) = self._db.execute("PRAGMA quick_check(1)")
        if found != "ok":
            raise ConfigError(f"the state file {self.path} is damaged ({found}): see "
                              "docs/operations.md")  # fmt: skip

    def rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """What a query finds. Raises ConfigError."""
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise ConfigError(f"the state file {self._said(error)}") from None

    def write(self, statement: str, values: Iterable[Sequence[object]] = ((),)) -> None:
        """Carries a statement out, once for each of `values`. Raises what `transaction` does."""
        with self.transaction():
            self._db.executemany(statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within it, or nothing. One within another is part of the outer.

        Raises UnavailableError where it cannot be written now; then nothing was.
        """
        if self._db.in_transaction:
            yield
            return
        if self._clock() < self._closed_until:
            raise self._refusal()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            with suppress(sqlite3.Error):  # a full disk rolls back by itself, a busy lock does not
                self._db.execute("ROLLBACK")
            # Only what SQLite met; a statement of ours that is wrong is a bug.
            if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError):
                self._failed(error)
                raise self._refusal() from None
            raise

    @property
    def problem(self) -> str:
        """Why nothing can be written, or what is written will not last; empty when all is well."""
        return self._problem

    def check(self) -> None:
        """Looks whether what kept the file from being written is over; to be called now and then.

        While there is a problem it writes as much as a large report, and takes it away again: it
        is over when there is room for work, not for a byte.
        """
        if self._problem:
            try:
                blob = "INSERT OR REPLACE INTO meta VALUES ('probe', zeroblob(?))"
                self.write(blob, [(_PROBE_BYTES,)])
                self.write("DELETE FROM meta WHERE key = 'probe'")
            except UnavailableError:
                return
            self._problem = ""
            _log.warning("the state file %s can be written again", self.path)
        if self._inode != self._found_inode():
            self._problem = (
                f"the state file {self.path} was removed or replaced: what is written now is lost "
                "at the next start; see docs/operations.md"
            )

    def _found_inode(self) -> int | None:
        if self.path == _MEMORY:
            return None
        with suppress(OSError):
            return os.stat(self.path).st_ino
        return None

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _failed(self, error: BaseException) -> None:
        self.failures += 1
        self._closed_until = self._clock() + _PAUSE_S
        before, self._problem = self._problem, f"cannot write its state file {self._said(error)}"
        if self._problem != before:
            _log.error("the load controller %s; it is tried again", self._problem)

    def _refusal(self) -> UnavailableError:
        return UnavailableError(
            f"the load controller {self._problem}; it goes on by itself then, without a restart",
            retry_after_s=1.0,
        )

    def _said(self, error: BaseException) -> str:
        """The file, what SQLite says of it, and what to do."""
        code = getattr(error, "sqlite_errorcode", 0)
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        hint = _HINTS.get(code & 0xFF, "look at its disk")
        return f"{self.path}: {error} ({name}): {hint}"
