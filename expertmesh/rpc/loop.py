"""The event loop of a process that has none of its own.

gRPC's asyncio stack wants one event loop in a process (with more, its poller prints spurious
BlockingIOErrors: grpc issues 25364 and 42357). Blocking clients, Ray actors and tests share this
one, which lives in a daemon thread from its first use on.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from expertmesh.errors import ConfigError

_T = TypeVar("_T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_pid = 0


def shared_loop() -> asyncio.AbstractEventLoop:
    """The running loop of the background thread."""
    global _loop, _pid
    with _lock:
        if _loop is not None and _pid != os.getpid():
            raise ConfigError(
                "this process was forked from one that used expertmesh, and gRPC does not survive "
                "a fork: start processes with the spawn method"
            )
        if _loop is None:
            _pid = os.getpid()
            _loop = uvloop.new_event_loop()
            started = threading.Event()
            _loop.call_soon(started.set)
            threading.Thread(target=_loop.run_forever, name="expertmesh-loop", daemon=True).start()
            started.wait()
        return _loop


def submit(coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
    """Starts the coroutine on the shared loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, shared_loop())


def turn() -> None:
    """Returns once the shared loop has turned; never, where it stands still."""
    run(asyncio.sleep(0))


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Runs the coroutine on the shared loop and waits; an interrupted wait cancels it."""
    future = submit(coroutine)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
