"""Waits until a cluster that was started can be asked, and says why it cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from expertmesh.client import connect
from expertmesh.errors import ConfigError, DeadlineError, MeshError, UnavailableError
from expertmesh.v1 import router_pb2

#: Nothing new for this long while servers start: give up and say who is missing.
STALLED_S = 180.0
#: The same where Ray's autoscaler may first have to get a node, and that node an image.
NODE_STALLED_S = 1200.0
_POLL_S = 0.1

Progress = Callable[[router_pb2.GetStatusResponse], None]


class Patience:
    """How long to look at something that does not change. No clock of its own."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: object = object()  # equal to nothing that is seen
        self._changed_at = 0.0

    def is_over(self, seen: object, now: float) -> bool:
        """Whether every look for longer than that has seen the same as this one."""
        if seen != self._last:
            self._last, self._changed_at = seen, now
        return now - self._changed_at > self._seconds


def has_ended(ref: Any) -> bool:
    """Whether an actor will never answer: it was ended, as after a drain, and not by a failure."""
    try:
        ray.get(ref, timeout=STALLED_S)
    except ray.exceptions.ActorDiedError:
        return True
    except Exception:  # for `get` to say
        return False
    return False


def get(ref: Any, what: str) -> Any:
    """What an actor answers. Raises its own MeshError, and ConfigError where it does not start."""
    try:
        return ray.get(ref, timeout=STALLED_S)
    except ray.exceptions.RayTaskError as error:
        raise _cause(error, what) from None
    except ray.exceptions.GetTimeoutError:
        raise ConfigError(
            f"Ray has not started {what} for {STALLED_S:.0f} s: its CPUs may be in use by others; "
            "see `ray status`"
        ) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(f"{what} could not start: {error}") from None


def _cause(error: ray.exceptions.RayTaskError, what: str) -> MeshError:
    cause = error.cause
    return cause if isinstance(cause, MeshError) else ConfigError(f"{what} failed: {error}")


def wait_ready(
    servers: Mapping[str, Any], routers: Sequence[str], progress: Progress | None, patience_s: float
) -> None:
    """Until every router can ask for every expert. Raises what a server says it failed of, and
    ConfigError when nothing moves for `patience_s`."""
    asked = {name: actor.endpoint.remote() for name, actor in servers.items()}
    started: set[str] = set()
    waiting = list(routers)
    patience = Patience(patience_s)
    while waiting:
        for name in [name for name in asked if ray.wait([asked[name]], timeout=0)[0]]:
            get(asked[name], f"expert server {name}")
            started.add(name)
            asked[name] = servers[name].endpoint.remote()  # it may yet fail
        status = _status_of(waiting[0])
        if progress is not None:
            progress(status or router_pb2.GetStatusResponse())
        if status is not None:
            _raise_failure(status)
            ready = sum(server.state == "ready" and server.connected for server in status.servers)
            if status.ready and ready == len(servers):
                waiting.pop(0)
                continue
        seen = (len(started), [] if status is None else [
            (server.state, server.loaded_bytes, server.connected) for server in status.servers
        ])  # fmt: skip
        if patience.is_over(seen, time.monotonic()):
            absent = sorted(servers.keys() - started)
            raise ConfigError(_stalled(absent, status, patience_s))
        time.sleep(_POLL_S)


def _status_of(address: str) -> router_pb2.GetStatusResponse | None:
    try:
        with connect(address, timeout=5.0) as mesh:
            return mesh.status()
    except (UnavailableError, DeadlineError):
        return None  # starting or busy: asked again


def _raise_failure(status: router_pb2.GetStatusResponse) -> None:
    for server in status.servers:
        if server.state == "failed":
            raise ConfigError(
                f"expert server {server.server_id} on node {server.node}: {server.error}"
            )


def _stalled(
    absent: Sequence[str], status: router_pb2.GetStatusResponse | None, after_s: float
) -> str:
    if absent:
        return (
            f"Ray has not started {', '.join(absent)} for {after_s:.0f} s: their CPUs, GPUs "
            "or memory may be in use by others; see `ray status`"
        )
    reason = "the router does not answer" if status is None else status.reason
    return f"nothing has moved for {after_s:.0f} s while starting: {reason}"
