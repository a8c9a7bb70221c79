"""This process's connection to Ray, shared by the clusters that it launches."""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
import traceback
from pathlib import Path
from typing import Any

import ray
from ray._private.node import Node

from expertmesh.errors import ConfigError
from expertmesh.rpc import engine
from expertmesh.rpc.address import parse_address

_PROBE_S = 3.0  # to find out whether anybody listens at a Ray address
_LINES = 5  # of what a process of Ray's said before it ended
_ERROR = re.compile(r"^\[[^]]* [EC] ")  # how a line of Ray's log begins that tells of an error


class RaySession:
    """A connection that ends with the last cluster that uses it, if it was made for clusters."""

    def __init__(self, *, ours: bool, local: bool) -> None:
        """`local` is whether that Ray was started here, for this process."""
        self.local = local
        self._ours = ours
        self._users = 0

    def join(self) -> RaySession:
        """One more cluster uses it."""
        self._users += 1
        return self

    def leave(self) -> None:
        """One cluster less."""
        global _session
        self._users -= 1
        if self._ours and self._users == 0:
            _session = None
            ray.shutdown()


_session: RaySession | None = None


def connect(address: str | None) -> RaySession:
    """Joins the Ray at `address` ("auto" or "host:port"), or starts one here for None.

    A connection that this process already has is used as it is: the caller's own is left alone at
    the end. Raises ConfigError when there is no Ray to join, or none can be started.
    """
    global _session
    if ray.is_initialized():
        return (_session or RaySession(ours=False, local=False)).join()
    if address is not None:
        _probe(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**_arguments(address))
    except BaseException as error:  # Ray raises bare ones, too; or somebody has pressed Ctrl-C
        ended = _give_up(error)
        if not isinstance(error, Exception):
            raise
        what = f"join Ray at {address!r}" if address else "start Ray on this machine"
        raise ConfigError(f"cannot {what}: {''.join((str(error), *ended))}") from None
    finally:
        # Ray takes SIGTERM over. A process without a handler of its own would end at once, and
        # leave its cluster to itself, so there Ray's stays.
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    _session = RaySession(ours=True, local=address is None)
    return _session.join()


def _arguments(address: str | None) -> dict[str, Any]:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        return {"address": "local", "include_dashboard": False, **quiet}
    return {"address": address, **quiet}


def _give_up(error: BaseException) -> list[str]:
    """Ends what had started when `error` came; what is to be said of it."""
    try:
        ray.shutdown()
    finally:
        ended = _abandon(error)
    return ended


def _abandon(error: BaseException) -> list[str]:
    """Ends what a node that did not start has started, and says which of it had ended by itself.

    Ray forgets such a node and leaves its processes running: nothing but the frames of the error
    leads to them.
    """
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    owners = (frame.f_locals.get("self") for frame in frames)
    node = next((owner for owner in owners if isinstance(owner, Node)), None)
    if node is None or not node.all_processes:
        return []
    logs = Path(node.get_logs_dir_path())
    ended = [
        f"\n{name} ended with {code}: {_last_words(logs, name)}"
        for name, infos in node.all_processes.items()
        if (code := infos[0].process.poll()) is not None
    ]
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    if not engine.APPLIED:
        ended.append(
            "\ngrpc was imported before expertmesh: its fork support can end what Ray starts; "
            "import expertmesh first"
        )
    return [*ended, f"\nRay's logs are in {logs}"]


def _last_words(logs: Path, name: str) -> str:
    """What a process said of its end: its first errors, else the end of what it said."""
    said = [
        line
        for kind in ("err", "out")
        if (log := logs / f"{name}.{kind}").exists()
        for line in log.read_text(errors="replace").splitlines()
    ]
    errors = [line for line in said if _ERROR.match(line)]
    return "\n".join(errors[:_LINES] or said[-_LINES:]) or "it said nothing"


def _probe(address: str) -> None:
    """Raises ConfigError when nobody listens at "host:port": Ray would try for minutes."""
    if address == "auto":
        return
    at = parse_address(address, "ray_address")
    try:
        socket.create_connection((at.host, at.port), timeout=_PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"cannot join Ray at {address!r}: {error}; is it running there? see `ray status`"
        ) from None
