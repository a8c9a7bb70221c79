"""`expertmesh down`: end the last cluster started on this host."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time

from expertmesh.errors import ConfigError
from fleet import state
from fleet.cli.output import emit

NAME = "down"
HELP = "End the cluster that `expertmesh serve` or `demo` started last on this host."
EXAMPLES = """\
  expertmesh down
"""
_WAIT_S = 60.0
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    """0 when no cluster runs any more."""
    last = state.recall()
    if last is None:
        return _say(arguments, "no cluster was running", None)
    if not _alive(last):
        state.forget(last.address)
        return _say(arguments, f"the cluster at {last.address} had ended already", last)
    if last.command not in ("serve", "demo"):
        raise ConfigError(
            f"the cluster at {last.address} belongs to process {last.pid}, which started it with "
            "fleet.launch: close it there"
        )
    _terminate(last)
    end = time.monotonic() + _WAIT_S
    while _alive(last):
        if time.monotonic() > end:
            raise ConfigError(f"process {last.pid} has not ended for {_WAIT_S:.0f} s")
        time.sleep(_POLL_S)
    state.forget(last.address)
    return _say(arguments, f"the cluster at {last.address} has ended", last)


def _terminate(last: state.LastCluster) -> None:
    """Asks the process to end. Raises ConfigError where it is not ours to ask."""
    try:
        os.kill(last.pid, signal.SIGTERM)
    except ProcessLookupError:
        return  # it has ended meanwhile
    except PermissionError:
        raise ConfigError(
            f"the cluster at {last.address} belongs to process {last.pid} of another user: only "
            "they can end it"
        ) from None


def _alive(last: state.LastCluster) -> bool:
    return state.started(last.pid) == last.started


def _say(arguments: argparse.Namespace, text: str, last: state.LastCluster | None) -> int:
    if arguments.json:
        emit(json.dumps({"event": "DOWN", "address": last.address if last else None}))
    else:
        emit(text)
    return 0
