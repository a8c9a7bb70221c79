"""An event loop whose clock goes on only when everybody waits for it, and then at once."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

_T = TypeVar("_T")
_TICK_S = 1e-12  # nobody looks twice at the same instant, so who waits for one gets past it


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
    """`asyncio.run`, in no time. `time.monotonic` is the loop's clock meanwhile, as it is of every
    other loop.
    """
    loop = VirtualLoop()
    with (
        asyncio.Runner(loop_factory=lambda: loop) as runner,
        mock.patch("time.monotonic", loop.time),
    ):
        return runner.run(scenario)
