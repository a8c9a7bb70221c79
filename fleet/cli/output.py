"""What commands print: JSON for programs, plain text when piped, progress on a terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from expertmesh.errors import MeshError
from expertmesh.v1 import router_pb2

ShowStatus = Callable[[router_pb2.GetStatusResponse], None]


def prepare_output() -> None:
    """Makes standard output take every character: what it has no code for becomes a "?"."""
    if isinstance(sys.__stdout__, io.TextIOWrapper):
        sys.__stdout__.reconfigure(errors="replace")


def can_show(text: str) -> bool:
    """Whether standard output has a code for every character."""
    try:
        text.encode(getattr(sys.__stdout__, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def emit(text: str, end: str = "\n") -> None:
    """Prints what the command has to say. What libraries print goes elsewhere: see `main`.

    Where nobody reads any more, as after `| head -1`, the command goes on and says no more.
    """
    try:
        print(text, end=end, file=sys.__stdout__, flush=True)
    except BrokenPipeError:
        assert sys.__stdout__ is not None
        # Python would try once more at its end, and say that it failed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


def as_json(error: MeshError) -> dict[str, Any]:
    """An error for programs."""
    return {"type": type(error).__name__, "reason": error.reason, "message": error.message}


def server_json(server: router_pb2.ServerStatus) -> dict[str, Any]:
    """One expert server for programs."""
    return {
        "server_id": server.server_id,
        "endpoint": server.endpoint,
        "state": server.state,
        "connected": server.connected,
        "suspected": server.suspected,
        "slots": server.slots,
        "loaded_bytes": server.loaded_bytes,
        "total_bytes": server.total_bytes,
        "pid": server.pid,
        "node": server.node,
        "backend": server.backend,
        "pairs_per_s": server.pairs_per_s,
        "rate": server.rate or 1.0,
        "transport": server.transport,
        "error": server.error,
    }


class LoadingBars:
    """One bar a server, in bytes, while a cluster starts. Plain lines where no terminal is."""

    def __init__(self, progress: Progress | None, *, quiet: bool = False) -> None:
        self._progress = progress
        self._quiet = quiet
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, str] = {}
        self._begun = False

    def __call__(self, status: router_pb2.GetStatusResponse) -> None:
        """Takes a router's view."""
        if self._quiet:
            return
        if self._progress is None and not self._begun:
            self._begun = True
            # Without a router there is no view of one, and nobody who could name the controller.
            up = "the router is up; " if status.controller else ""
            print(f"{up}expert servers start", file=sys.stderr, flush=True)
        for server in status.servers:
            if self._progress is None:
                self._say(server)
                continue
            task = self._tasks.get(server.server_id)
            if task is None:
                task = self._tasks[server.server_id] = self._progress.add_task(
                    server.server_id, total=max(1, server.total_bytes)
                )
            self._progress.update(task, completed=server.loaded_bytes)

    def _say(self, server: router_pb2.ServerStatus) -> None:
        if self._said.get(server.server_id) != server.state:
            self._said[server.server_id] = server.state
            print(
                f"{server.server_id} on {server.node}: {server.state}, "
                f"{server.loaded_bytes / 1e6:.1f} of {server.total_bytes / 1e6:.1f} MB",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def loading_bars(*, quiet: bool, check: Callable[[], None]) -> Iterator[ShowStatus]:
    """What to hand to `launch` as its progress. `check` is called each time, and may raise."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _checking(check, LoadingBars(None, quiet=quiet))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _checking(check, LoadingBars(progress))


def _checking(check: Callable[[], None], show: ShowStatus) -> ShowStatus:
    def call(status: router_pb2.GetStatusResponse) -> None:
        check()
        show(status)

    return call
