"""Work in the background: short steps, and rests between them while requests are answered."""

from __future__ import annotations

import time
from collections.abc import Callable

from expertmesh.errors import UnavailableError

#: Between two rests: what a request may have to wait behind, and long enough for the rests to be
#: slept through at the scheduler's grain.
STEP_S = 1e-3


class Pacer:
    """Called between small pieces of work, by the thread that does it: rests when it is time to.

    Time that the thread was kept from its core counts as work, so that it rests the longer the
    busier the host is.
    """

    def __init__(
        self,
        share: float,
        is_serving: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """At most `share` of the time is worked, in (0, 1], as long as `is_serving` says so."""
        self._rest = 1.0 / share - 1.0
        self._is_serving = is_serving
        self._clock = clock
        self._sleep = sleep
        self._since = clock()
        self._given_up = False

    def give_up(self) -> None:
        """From any thread: the work shall end where it next could rest."""
        self._given_up = True

    def __call__(self) -> None:
        """A place where work may rest. Raises UnavailableError once it is given up."""
        if self._given_up:
            raise UnavailableError("loading slots was given up", retry_after_s=1.0)
        worked = self._clock() - self._since
        if worked < STEP_S:
            return
        if self._is_serving():
            self._sleep(self._rest * worked)
        self._since = self._clock()
