"""Expert servers on Ray for a load controller and routers that run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

from expertmesh.errors import ConfigError, DeadlineError, UnavailableError
from expertmesh.rpc.address import parse_address
from expertmesh.v1 import router_pb2
from fleet import control
from fleet.ready import Patience, Progress, get

_POLL_S = 0.2


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
    progress: Progress | None,
    *,
    patience_s: float,
) -> None:
    """Until every server has loaded its shard. Raises what one says it failed of, and ConfigError
    when nothing moves for `patience_s`. `servers` are actors by server id.
    """
    asked = {name: actor.status.remote() for name, actor in servers.items()}
    seen: dict[str, router_pb2.ServerStatus] = {}
    patience = Patience(patience_s)
    while any(name not in seen or seen[name].state != "ready" for name in servers):
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_POLL_S)
        for name in [name for name, ref in asked.items() if ref in done]:
            answer = get(asked[name], f"expert server {name}")
            seen[name] = router_pb2.ServerStatus.FromString(answer)
            asked[name] = servers[name].status.remote()
        if progress is not None and done:
            progress(router_pb2.GetStatusResponse(servers=seen.values()))
        loaded = sum(server.loaded_bytes for server in seen.values())
        if patience.is_over((len(seen), loaded), time.monotonic()):
            absent = ", ".join(sorted(servers.keys() - seen.keys())) or "weights"
            raise ConfigError(
                f"nothing has moved for {patience_s:.0f} s while waiting for {absent}: CPUs, GPUs, "
                "expert_slots or memory may be in use by others, or no node offers them; see "
                "`ray status`"
            )
        time.sleep(_POLL_S)
