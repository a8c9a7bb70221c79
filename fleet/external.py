"""Expert servers on Ray for a load controller and routers that run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from expertmesh.errors import ConfigError, DeadlineError, MeshError, UnavailableError
from expertmesh.rpc.address import parse_address
from expertmesh.v1 import router_pb2
from fleet import control

_POLL_S = 0.2
#: Nothing new for this long while servers start: give up and say who is missing.
STALLED_S = 180.0
#: The same where Ray's autoscaler may first have to get a node, and that node an image.
NODE_STALLED_S = 1200.0


def check_controller(address: str) -> None:
    """Raises ConfigError when no load controller answers at "host:port"."""
    parse_address(address, "controller")
    try:
        control.cluster_load(address)
    except (UnavailableError, DeadlineError) as error:
        raise ConfigError(
            f"no load controller answers at {address!r} ({error.code.name}): is that its "
            "address, and does it run?"
        ) from None


def wait_loaded(
    servers: Mapping[str, Any],
    progress: Callable[[router_pb2.GetStatusResponse], None] | None,
    *,
    patience_s: float,
) -> None:
    """Until every server has loaded its shard. Raises what one says it failed of, and ConfigError
    when nothing moves for `patience_s`. `servers` are actors by server id.
    """
    asked = {name: actor.status.remote() for name, actor in servers.items()}
    seen: dict[str, router_pb2.ServerStatus] = {}
    last, moved_at = 0, time.monotonic()
    while any(name not in seen or seen[name].state != "ready" for name in servers):
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_POLL_S)
        for name in [name for name, ref in asked.items() if ref in done]:
            seen[name] = _status(asked[name], name)
            asked[name] = servers[name].status.remote()
        if progress is not None and done:
            progress(router_pb2.GetStatusResponse(servers=seen.values()))
        now = len(seen) + sum(server.loaded_bytes for server in seen.values())
        if now != last:
            last, moved_at = now, time.monotonic()
        if time.monotonic() - moved_at > patience_s:
            absent = ", ".join(sorted(servers.keys() - seen.keys())) or "weights"
            raise ConfigError(
                f"nothing has moved for {patience_s:.0f} s while waiting for {absent}: CPUs, GPUs, "
                "expert_slots or memory may be in use by others, or no node offers them; see "
                "`ray status`"
            )
        time.sleep(_POLL_S)


def _status(ref: Any, name: str) -> router_pb2.ServerStatus:
    try:
        return router_pb2.ServerStatus.FromString(ray.get(ref))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, MeshError):
            raise cause from None
        raise ConfigError(f"expert server {name} failed: {error}") from None
    except ray.exceptions.RayError as error:
        raise ConfigError(f"expert server {name} could not start: {error}") from None
