"""What the load controller must not forget, in one SQLite file.

Everything is written before it is told to anyone, and what belongs together in one transaction, so
that after a crash at any instant the controller knows exactly what it had published, or the next
state: a report with the windows that it closed, never one without the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from expertmesh.model import Slot
from load_controller.balancer import Progress
from load_controller.holdings import Assignment, Holdings
from load_controller.ledger import Report, SourceKey
from load_controller.migration import Copy
from load_controller.state_file import StateFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS reports (
  kind TEXT, source TEXT, incarnation TEXT, sequence INTEGER NOT NULL, layer INTEGER, counts BLOB,
  PRIMARY KEY (kind, source, incarnation, layer)
);
CREATE TABLE IF NOT EXISTS deltas (
  layer INTEGER PRIMARY KEY, windows INTEGER NOT NULL, delta BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS hidden (
  server_id TEXT, layer INTEGER, expert INTEGER, PRIMARY KEY (server_id, layer, expert)
);
CREATE TABLE IF NOT EXISTS assigned (
  server_id TEXT PRIMARY KEY, initial TEXT NOT NULL, slots TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS servers (
  server_id TEXT PRIMARY KEY, started_at_ns INTEGER NOT NULL, announcement BLOB NOT NULL
);
"""


class Store:
    """One controller's file. Used from one thread.

    What saves raises UnavailableError where the file cannot be written now; then nothing was.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens or makes the file; ":memory:" forgets everything at the end. Raises ConfigError."""
        self.file = StateFile(path, _SCHEMA, clock)

    def meta(self, key: str) -> str | None:
        """A single fact, None when it was never stored."""
        rows = self.file.rows("SELECT value FROM meta WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else None

    def set_meta(self, key: str, value: str) -> None:
        """Stores a single fact."""
        self.file.write("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(key, value)])

    def save_report(self, kind: str, report: Report) -> None:
        """Replaces what the source had reported."""
        self.file.write(
            "INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?, ?, ?)",
            [
                (kind, *report.key, report.sequence, layer, counts.tobytes())
                for layer, counts in report.totals.items()
            ],
        )

    def reports(self, kind: str) -> list[Report]:
        """Every source's last report of that kind."""
        rows = self.file.rows(
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

    def save_bias(self, version: int, mode: str, progress: Mapping[int, Progress]) -> None:
        """Replaces the published bias: version, mode and every layer's delta."""
        with self.transaction():
            self.set_meta("bias_version", str(version))
            self.set_meta("balance_mode", mode)
            self.file.write("DELETE FROM deltas")
            self.file.write(
                "INSERT INTO deltas VALUES (?, ?, ?)",
                [
                    (layer, each.windows, each.delta.numpy().tobytes())
                    for layer, each in progress.items()
                ],
            )

    def progress(self) -> dict[int, Progress]:
        """Every layer's published delta."""
        rows = self.file.rows("SELECT layer, windows, delta FROM deltas")
        return {
            layer: Progress(torch.from_numpy(np.frombuffer(delta, np.float32).copy()), windows)
            for layer, windows, delta in rows
        }

    def save_server(
        self, server_id: str, started_at_ns: int, announcement: bytes, versions: tuple[int, int]
    ) -> None:
        """Replaces a server's announcement, with the directory version and epoch it led to."""
        with self.transaction():
            self.file.write(
                "INSERT OR REPLACE INTO servers VALUES (?, ?, ?)",
                [(server_id, started_at_ns, announcement)],
            )
            self.set_meta("directory_version", str(versions[0]))
            self.set_meta("epoch", str(versions[1]))

    def forget_server(self, server_id: str, directory_version: int) -> None:
        """Removes a server's announcement, with the directory version that it led to."""
        with self.transaction():
            self.file.write("DELETE FROM servers WHERE server_id = ?", [(server_id,)])
            self.set_meta("directory_version", str(directory_version))

    def servers(self) -> list[tuple[int, bytes]]:
        """(started_at_ns, announcement) of every server that was ever announced."""
        rows = self.file.rows("SELECT started_at_ns, announcement FROM servers")
        return [(int(started), bytes(announcement)) for started, announcement in rows]

    def save_holdings(self, holdings: Holdings, epoch: int) -> None:
        """Replaces hidden copies and assignments, with the epoch that they belong to."""
        with self.transaction():
            self.set_meta("epoch", str(epoch))
            self.file.write("DELETE FROM hidden")
            self.file.write(
                "INSERT INTO hidden VALUES (?, ?, ?)",
                [(copy.server, *copy.slot) for copy in holdings.hidden],
            )
            self.file.write("DELETE FROM assigned")
            self.file.write(
                "INSERT INTO assigned VALUES (?, ?, ?)",
                [
                    (server, json.dumps(sorted(each.initial)), json.dumps(sorted(each.slots)))
                    for server, each in holdings.assigned.items()
                ],
            )

    def holdings(self) -> Holdings:
        """What was last saved. Copies that were arriving are leaving: nobody waits for them."""
        hidden = self.file.rows("SELECT server_id, layer, expert FROM hidden")
        assigned = self.file.rows("SELECT server_id, initial, slots FROM assigned")
        return Holdings(
            leaving={Copy(server, Slot(layer, expert)) for server, layer, expert in hidden},
            assigned={
                server: Assignment(_slots(initial), _slots(slots))
                for server, initial, slots in assigned
            },
        )

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def transaction(self) -> AbstractContextManager[None]:
        """All that is written within it, or nothing. One within another is part of the outer."""
        return self.file.transaction()


def _slots(text: str) -> frozenset[Slot]:
    return frozenset(Slot(layer, expert) for layer, expert in json.loads(text))
