"""Many deadlines, of which hardly one is ever reached, behind one timer of the event loop."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count

_PURGE_FROM = 1024  # entries


class Timer:
    """One callback that shall run at its time, unless it is cancelled before."""

    __slots__ = ("_call", "_timers", "at")

    def __init__(self, timers: Timers, at: float, call: Callable[[], object]) -> None:
        self.at = at  # seconds, the loop's clock
        self._timers = timers
        self._call: Callable[[], object] | None = call

    @property
    def pending(self) -> bool:
        """Whether it has neither run nor been cancelled."""
        return self._call is not None

    def cancel(self) -> None:
        """It will not run, and what it would have called is let go at once."""
        if self._call is not None:
            self._call = None
            self._timers.note_cancelled()

    def run(self) -> None:
        """Runs it, once."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Timers:
    """Runs callbacks at their times.

    To set a timer of the loop and cancel it again takes longer than to keep a list of what may
    come due: the loop is asked only for the earliest, and again when that has passed.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._cancelled = 0  # in the heap
        self._handle: asyncio.TimerHandle | None = None
        self._asked_for = 0.0  # what the handle waits for

    def __len__(self) -> int:
        """Entries kept, cancelled ones among them."""
        return len(self._heap)

    def after(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Calls in that many seconds, never sooner."""
        loop = asyncio.get_running_loop()
        timer = Timer(self, loop.time() + seconds, call)
        heapq.heappush(self._heap, (timer.at, next(self._order), timer))
        if self._handle is None or timer.at < self._asked_for:
            self._ask(loop)
        return timer

    def close(self) -> None:
        """Nothing runs any more."""
        for _, _, timer in self._heap:
            timer.cancel()
        self._heap.clear()
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def note_cancelled(self) -> None:
        """One entry of the heap is dead: those that wait long are not kept until their time."""
        self._cancelled += 1
        if self._cancelled > max(_PURGE_FROM, len(self._heap) // 2):
            self._heap = [entry for entry in self._heap if entry[2].pending]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def _ask(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._asked_for = self._heap[0][0]
        self._handle = loop.call_at(self._asked_for, self._run, loop)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = None
        now = loop.time()
        try:
            while self._heap and (self._heap[0][0] <= now or not self._heap[0][2].pending):
                _, _, timer = heapq.heappop(self._heap)
                if timer.pending:
                    timer.run()
                else:
                    self._cancelled -= 1
        finally:  # one that raises ends this turn, and keeps no other from its time
            if self._handle is None and self._heap:
                self._ask(loop)
