"""The expert servers of a supervised cluster as Ray knows them: named actors in one namespace.

They are detached: they live on when the supervisor that made them is killed, and the next one finds
them by name. Each ends by itself once the namespace has had no supervisor for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util import list_named_actors

from expert_service.actor import ExpertServerActor, ExpertServerOptions
from expertmesh.model import Slot
from fleet.resources import EXPERT_SLOT, Request

_PREFIX = "expert-"
_STOP_S = 15.0  # a stopping server may take this long to drain before it is killed


def namespace_of(controller: str) -> str:
    """Where the actors of the cluster of that load controller have their names."""
    return f"expertmesh-{controller}"


def server_options(request: Request) -> dict[str, Any]:
    """What every expert server asks of Ray."""
    return {
        "num_cpus": request.cpus,
        "num_gpus": request.gpus,
        "memory": request.memory_bytes,
        "resources": {EXPERT_SLOT: request.expert_slots} if request.expert_slots else None,
        "max_restarts": -1,
        "scheduling_strategy": "SPREAD",
        # Ray's own choice is one thread below two CPUs; ours is what we planned with. Idle threads
        # sleep: spinning ones take the cores of the other shards on a host.
        "runtime_env": {
            "env_vars": {"OMP_NUM_THREADS": str(request.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        },
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """Makes, finds and ends a cluster's servers."""

    namespace: str
    request: Request
    template: ExpertServerOptions  # what they share
    metrics_port: int | None = None  # each on a node of its own

    def start(self, name: str, slots: Sequence[Slot]) -> Any:
        """Asks Ray for a server; its actor. One of that name that is there is left as it is."""
        options = replace(
            self.template,
            server_id=name,
            slots=tuple(slots),
            namespace=self.namespace,
            metrics_port=self.metrics_port,
        )
        return ExpertServerActor.options(  # type: ignore[attr-defined]
            name=_PREFIX + name,
            namespace=self.namespace,
            lifetime="detached",
            get_if_exists=True,
            **server_options(self.request),
        ).remote(options)

    def names(self) -> set[str]:
        """Every server that Ray has or shall start, by server id."""
        return {
            actor["name"].removeprefix(_PREFIX)
            for actor in list_named_actors(all_namespaces=True)
            if actor["namespace"] == self.namespace and actor["name"].startswith(_PREFIX)
        }

    def actors(self) -> dict[str, Any]:
        """Their actors."""
        found = {}
        for name in sorted(self.names()):
            try:
                found[name] = ray.get_actor(_PREFIX + name, namespace=self.namespace)
            except ValueError:  # it has ended since
                continue
        return found

    def end(self, name: str, graceful: bool) -> None:
        """Ends a server; where that makes sense it is asked to stop, and waited for, before."""
        try:
            actor = ray.get_actor(_PREFIX + name, namespace=self.namespace)
        except ValueError:
            return
        if graceful:
            ray.wait([actor.stop.remote()], timeout=_STOP_S)
        ray.kill(actor)
