"""The supervisor as a Ray actor: restarted by Ray, and found by its name by the servers it made."""

from __future__ import annotations

import os
import threading
import uuid
from dataclasses import dataclass

import ray

from expert_service.actor import CONTROL, SUPERVISOR
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import AutoscaleConfig
from expertmesh.rpc import loop
from expertmesh.rpc.process import setup_logging
from fleet.roster import Roster
from fleet.scaling import ServerPlan
from fleet.supervisor import Supervisor

__all__ = ["SUPERVISOR", "SupervisorActor", "SupervisorOptions"]
_STOP_S = 30.0  # a step under way may take this long to come to a point where it can be left


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorOptions:
    """Everything the constructor needs, so that a restart needs nothing else."""

    checkpoint: str
    shards: int
    controller: str  # "host:port"
    config: AutoscaleConfig
    roster: Roster


@ray.remote(concurrency_groups={CONTROL: 1})
class SupervisorActor:
    """One supervisor, in a thread of its own."""

    def __init__(self, options: SupervisorOptions) -> None:
        setup_logging()
        with Checkpoint.open(options.checkpoint) as opened:
            plan = ServerPlan(opened.spec, options.shards)
        supervisor = Supervisor(
            options.controller, plan, options.config, options.roster,
            owner=f"supervisor {uuid.uuid4().hex[:12]}",
        )  # fmt: skip
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=supervisor.run, args=(self._stopped,), daemon=True)
        self._thread.start()

    def pid(self) -> int:
        """Process id on its node."""
        return os.getpid()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]
    def ping(self) -> None:
        """Answers when the event loop runs, which every step of the supervisor needs."""
        loop.turn()

    def stop(self) -> None:
        """Ends the loop and gives the lease back. The servers stay."""
        self._stopped.set()
        self._thread.join(_STOP_S)
