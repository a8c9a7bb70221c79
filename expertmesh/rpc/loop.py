"""The event loop of a process that has none of its own.

gRPC's asyncio stack wants one event loop in a process (with more, its poller prints spurious
BlockingIOErrors: grpc issues 25364 and 42357). Blocking clients, Ray actors and tests share this
one, which lives in a daemon thread from its first use on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from expertmesh.rpc import forks

_T = TypeVar("_T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def shared_loop() -> asyncio.AbstractEventLoop:
    """The running loop of the background thread. Raises ConfigError; see `forks`."""
    global _loop
    forks.use_grpc()
    with _lock:
        if _loop is None:
            _loop = uvloop.new_event_loop()
            started = threading.Event()
            _loop.call_soon(started.set)
            threading.Thread(target=_loop.run_forever, name="expertmesh-loop", daemon=True).start()
            started.wait()
        return _loop


def submit(coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
    """Starts the coroutine on the shared loop."""
    try:
        running = shared_loop()
    except BaseException:
        coroutine.close()  # it will never run
        raise
    return asyncio.run_coroutine_threadsafe(coroutine, running)


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
