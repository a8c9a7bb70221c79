"""What the load controller must not forget, in one SQLite file.

Everything is written before it is told to anyone, in one transaction each, so that after a crash
at any instant the controller knows at least what it had published.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import torch

from load_controller.ledger import Report, SourceKey

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS reports (
  kind TEXT, source TEXT, incarnation TEXT, sequence INTEGER NOT NULL, layer INTEGER, counts BLOB,
  PRIMARY KEY (kind, source, incarnation, layer)
);
CREATE TABLE IF NOT EXISTS bias (layer INTEGER PRIMARY KEY, delta BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS servers (
  server_id TEXT PRIMARY KEY, started_at_ns INTEGER NOT NULL, announcement BLOB NOT NULL
);
"""


class Store:
    """One controller's file. Used from one thread."""

    def __init__(self, path: str | Path) -> None:
        """Opens or makes the file; ":memory:" forgets everything at the end."""
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # WAL with NORMAL survives the death of the process at any instant: what we promise.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)

    def meta(self, key: str) -> str | None:
        """A single fact, None when it was never stored."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Stores a single fact."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def save_report(self, kind: str, report: Report) -> None:
        """Replaces what the source had reported."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (kind, *report.key, report.sequence, layer, counts.tobytes())
                    for layer, counts in report.totals.items()
                ],
            )

    def reports(self, kind: str) -> list[Report]:
        """Every source's last report of that kind."""
        rows = self._db.execute(
            "SELECT source, incarnation, sequence, layer, counts FROM reports WHERE kind = ?",
            (kind,),
        )
        grouped: dict[SourceKey, tuple[int, dict[int, np.ndarray]]] = {}
        for source, incarnation, sequence, layer, counts in rows:
            key = SourceKey(source, incarnation)
            last, totals = grouped.get(key, (0, {}))
            totals[layer] = np.frombuffer(counts, np.int64)
            grouped[key] = (max(last, sequence), totals)
        return [Report(key, last, totals) for key, (last, totals) in grouped.items()]

    def save_bias(self, version: int, mode: str, deltas: dict[int, torch.Tensor]) -> None:
        """Replaces the published bias: version, mode and every layer's delta."""
        with self._transaction():
            self.set_meta("bias_version", str(version))
            self.set_meta("balance_mode", mode)
            self._db.execute("DELETE FROM bias")
            self._db.executemany(
                "INSERT INTO bias VALUES (?, ?)",
                [(layer, delta.numpy().tobytes()) for layer, delta in deltas.items()],
            )

    def deltas(self) -> dict[int, torch.Tensor]:
        """Every layer's published delta, [E] float32."""
        rows = self._db.execute("SELECT layer, delta FROM bias")
        return {
            layer: torch.from_numpy(np.frombuffer(delta, np.float32).copy())
            for layer, delta in rows
        }

    def save_server(
        self, server_id: str, started_at_ns: int, announcement: bytes, versions: tuple[int, int]
    ) -> None:
        """Replaces a server's announcement, with the directory version and epoch it led to."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO servers VALUES (?, ?, ?)",
                (server_id, started_at_ns, announcement),
            )
            self.set_meta("directory_version", str(versions[0]))
            self.set_meta("epoch", str(versions[1]))

    def servers(self) -> list[tuple[int, bytes]]:
        """(started_at_ns, announcement) of every server that was ever announced."""
        rows = self._db.execute("SELECT started_at_ns, announcement FROM servers")
        return [(int(started), bytes(announcement)) for started, announcement in rows]

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN on entry, COMMIT on a clean exit, else ROLLBACK."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
