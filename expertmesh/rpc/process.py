"""What every service's `python -m` does: log, run until a signal, say why it failed."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from expertmesh.errors import MeshError
from expertmesh.rpc.heap import keep_freed_memory

_log = logging.getLogger(__name__)


class Service(Protocol):
    """Something that is started and stopped on one event loop."""

    async def start(self) -> None:
        """Begins to serve."""
        ...

    async def stop(self) -> None:
        """Ends gracefully."""
        ...


def setup_logging(level: str = "INFO") -> None:
    """One line a record, on standard error."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )


def say_listening(address: str, metrics_address: str = "") -> None:
    """Prints where a service can be reached, for whoever started it; serves also unread."""
    metrics = f" metrics {metrics_address}" if metrics_address else ""
    try:
        print(f"LISTENING {address}{metrics}", flush=True)
    except OSError as error:  # the log's disk is full, or nobody reads the pipe any more
        _log.warning("cannot say where this service listens: %s", error)


async def run_until_signal(
    service: Service,
    on_started: Callable[[], None],
    failed: Awaitable[MeshError | None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, or until `failed` is done. Raises the error that it gives."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await service.start()
    settle_memory()
    on_started()
    stopped = asyncio.ensure_future(stop.wait())
    waits: list[asyncio.Future[Any]] = [stopped]
    if failed is not None:
        waits.append(asyncio.ensure_future(failed))
    done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    await service.stop()
    stopped.cancel()
    for future in done:
        if future is not stopped:
            outcome = future.result()
            if isinstance(outcome, MeshError):
                raise outcome


def settle_memory() -> None:
    """What a process does once, when it has loaded what it serves with."""
    keep_what_is_loaded()
    keep_freed_memory()


def keep_what_is_loaded() -> None:
    """Tells the garbage collector that modules stay.

    A full collection looks at some 180,000 objects of torch's modules and held a process up for 70
    to 180 ms, whatever it was answering; frozen, it takes microseconds.
    """
    gc.collect()
    gc.freeze()


def exit_code(main: Callable[[], None]) -> int:
    """Runs a command: 0, or 1 with the error's message on standard error."""
    try:
        main()
    except MeshError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0
