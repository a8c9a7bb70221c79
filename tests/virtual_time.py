"""An event loop whose clock goes on only when everybody waits for it, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

_T = TypeVar("_T")
#: The least time between two turns of the loop, as a real clock has one: code that waits again and
#: again for what is left until an instant would otherwise never get past it, by rounding.
_TICK_S = 1e-12


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time starts at 0 and is what timers are set to: no test waits, and all can be exact."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """The loop's clock."""
        return self.now


class _Selector(selectors.SelectSelector):
    """Waits for nothing: it lets the time pass in which nothing happens."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now. Raises where all wait for what no timer brings."""
        if timeout is None:
            raise RuntimeError("everybody waits for ever")
        self._loop.now += max(timeout, _TICK_S)
        return super().select(0)


def run_in_virtual_time(scenario: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run` in no time.

    Until it ends `time.monotonic()` is the loop's clock, for code that reads it beside the timers
    that it sets on the loop.
    """
    loop = VirtualLoop()
    with (
        asyncio.Runner(loop_factory=lambda: loop) as runner,
        mock.patch("time.monotonic", loop.time),
    ):
        return runner.run(scenario)
