"""An owner for tasks that outlive the call that starts them.

Work that ends is spawned: who waits for it hears of its error. A loop that shall turn as long as
the service does is kept: no error ends it, and nobody need look for one that is dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from expertmesh.errors import MeshError

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_PAUSE_S = 0.5  # after a loop's first error, doubled up to ...
_MOST_PAUSE_S = 10.0  # ... this
_SETTLED_S = 5.0  # a loop that has turned so long since its last error has got over it


@dataclass(frozen=True, slots=True)
class _Problem:
    text: str
    until: float  # monotonic seconds: what has not come again by then is over


class TaskSet:
    """Holds background tasks: logs one that fails, keeps loops alive, cancels all at the end."""

    def __init__(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._sleep = sleep
        self._tasks: set[asyncio.Task[Any]] = set()
        self._problems: dict[str, _Problem] = {}
        #: How often each kept loop was ended by an error, by its name.
        self.failures: dict[str, int] = {}

    def spawn(self, coroutine: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
        """Starts work that ends, as a task that this set owns."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def keep(self, run: Callable[[], Awaitable[_T]], name: str, of: str = "") -> asyncio.Task[_T]:
        """Starts a loop that no error ends: it is called again, after ever longer pauses.

        The task is done when `run` returns, with what it returned. `name` is the loop's in logs,
        status and metrics; `of` tells one of several loops of that name from the others.
        """
        self.failures.setdefault(name, 0)
        return self.spawn(self._keep(run, name, of), f"{name} {of}".rstrip())

    @property
    def problem(self) -> str:
        """Which loops have failed lately, and how; empty when all turn."""
        now = time.monotonic()
        self._problems = {key: each for key, each in self._problems.items() if each.until > now}
        return "; ".join(each.text for each in self._problems.values())

    async def _keep(self, run: Callable[[], Awaitable[_T]], name: str, of: str) -> _T:
        clock, pause_s = time.monotonic, _PAUSE_S
        while True:
            began_at = clock()
            try:
                return await run()
            except asyncio.CancelledError as error:
                if (task := asyncio.current_task()) is None or task.cancelling():
                    raise
                failure: BaseException = error  # not this loop was cancelled, but what it awaited
            except Exception as error:
                failure = error
            if clock() - began_at > _SETTLED_S:
                pause_s = _PAUSE_S
            self._failed(name, of, failure, clock() + pause_s + _SETTLED_S)
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    def _failed(self, name: str, of: str, error: BaseException, until: float) -> None:
        self.failures[name] += 1
        key = f"{name} {of}".rstrip()
        said = error.message if isinstance(error, MeshError) else repr(error)
        text = f"the loop {key!r} has failed: {said}"
        before = self._problems.get(key)
        self._problems[key] = _Problem(text, until)
        if before is None or before.text != text:  # its traceback once, not at every try
            _log.error("%s; it is started again", text, exc_info=error)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task %s failed", task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancels every task and waits until all have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
