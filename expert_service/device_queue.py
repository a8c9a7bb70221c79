"""What waits for the device, and what it does next. Pure: no thread, no clock.

Requests take turns in the order in which they came. Small ones for the same layer are computed
together, since the weights that they share are then read once. A large one gives its place up after
a block of rows when others wait, and looks for them after some blocks, so that one client's prompt
of 16,000 tokens does not hold up the next token of everybody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

#: Blocks that a large job computes in one go while nobody waits: larger ones are a little faster.
_BLOCKS_ALONE = 4


@dataclass(slots=True, eq=False)
class Job:
    """Some rows to be computed, of which `done` are."""

    key: Hashable  # jobs of the same key can be computed together
    rows: int
    done: int = 0

    @property
    def left(self) -> int:
        """Rows not computed yet."""
        return self.rows - self.done


class Piece(NamedTuple):
    """Rows start .. stop - 1 of a job; stop is rows for its last piece."""

    job: Job
    start: int
    stop: int


class DeviceQueue:
    """Jobs in turn."""

    def __init__(self, merge_rows: int, block_rows: int) -> None:
        """Jobs are merged up to `merge_rows`, and cut into blocks of `block_rows`."""
        self._merge_rows = merge_rows
        self._block_rows = block_rows
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def push(self, job: Job) -> None:
        """One more job, behind the others."""
        self._jobs.append(job)

    def next(self) -> list[Piece]:
        """What to compute now, in one go: pieces of jobs of one key, nothing when nobody waits.

        A job whose piece is not its last is put back behind the others.
        """
        if not self._jobs:
            return []
        first = self._jobs.popleft()
        # Alone, too, it is cut, if not as finely: who comes meanwhile waits for a turn to end.
        turn_rows = self._block_rows * (1 if self._jobs else _BLOCKS_ALONE)
        if first.left > turn_rows:
            piece = Piece(first, first.done, first.done + turn_rows)
            first.done = piece.stop
            self._jobs.append(first)
            return [piece]
        pieces = [Piece(first, first.done, first.rows)]
        first.done = first.rows
        if self._jobs:
            pieces += self._company(
                first.key, self._merge_rows - (pieces[0].stop - pieces[0].start)
            )
        return pieces

    def _company(self, key: Hashable, room: int) -> list[Piece]:
        """Waiting jobs of that key that fit into `room` rows whole; others keep their turn."""
        pieces: list[Piece] = []
        waiting: deque[Job] = deque()
        for job in self._jobs:
            if job.key == key and job.left <= room:
                room -= job.left
                pieces.append(Piece(job, job.done, job.rows))
                job.done = job.rows
            else:
                waiting.append(job)
        self._jobs = waiting
        return pieces
