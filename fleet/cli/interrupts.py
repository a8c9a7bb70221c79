"""SIGINT, SIGTERM and SIGHUP for commands that start a cluster: none is ever lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """Turns these signals into KeyboardInterrupt, and remembers them.

    Python raises KeyboardInterrupt wherever the main thread happens to be. Where that is a
    destructor or a callback of a library, the exception is swallowed: `check` raises it again.
    """

    def __init__(self) -> None:
        """Takes the signals over, for the rest of the process."""
        self._seen = threading.Event()
        self._raising = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._take)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` lets it be ignored
            signal.signal(signal.SIGHUP, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._seen.set()
        if self._raising:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt when a signal has come."""
        if self._seen.is_set():
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From now on no signal raises: `wait` returns for it, also for one that comes before."""
        self._raising = False

    def wait(self) -> None:
        """Returns once a signal comes, or has come; none raises any more."""
        self.hold()
        self._seen.wait()
