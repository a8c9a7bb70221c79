"""Keeps as many expert servers as the autoscaler wants: looks, decides, does one step, looks again.

What is there is read anew each time, from Ray and from the load controller; what was decided before
only shortens waits. So it may be killed at any point, and the next one goes on. A lease at the load
controller keeps a second one from acting (docs/decisions/0006).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol

from expertmesh.codec.slots import slots_of
from expertmesh.config import AutoscaleConfig
from expertmesh.errors import LeaseLostError, MeshError
from expertmesh.model import Slot
from expertmesh.v1 import control_pb2 as pb
from fleet import control
from fleet.measured import Looks
from fleet.moves_away import Counts
from fleet.redundancy import moves_to_have, redundant_slots
from fleet.scaling import Drain, End, Member, ServerPlan, Start, Step, bounded, next_steps
from load_controller.autoscale import Context, Decision, State, decide

_log = logging.getLogger(__name__)
TURN_S = 1.0  # servers announce themselves as often
MOST_PAUSE_S = 15.0  # between turns that fail, one after the other
LEASE_S = 20.0
_RENEW_S = 1.0


class Servers(Protocol):
    """Makes and ends servers. `fleet.roster.Roster` is the real one."""

    def names(self) -> set[str]:
        """Every server that there is or shall be."""
        ...

    def start(self, name: str, slots: Sequence[Slot]) -> Any:
        """Asks for a server; one of that name is left as it is."""
        ...

    def end(self, name: str, graceful: bool) -> None:
        """Ends a server."""
        ...


class Supervisor:
    """One loop. Used from one thread."""

    def __init__(
        self,
        controller: str,
        plan: ServerPlan,
        config: AutoscaleConfig,
        servers: Servers,
        *,
        owner: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`controller` is "host:port"; `owner` differs for every process."""
        self._controller = controller
        self._plan = plan
        self._config = config
        self._servers = servers
        self._owner = owner
        self._clock = clock
        self._looks = Looks()
        self._state: State | None = None
        self._since: dict[tuple[str, str], float] = {}  # server and state: first seen
        self._renewed_at = clock()
        self._fence = 0
        self._adjusted: tuple[object, ...] = ()
        self.report = pb.ScalingReport(
            slots=plan.slots,
            configured=pb.ServerBounds(
                min_replicas=config.min_replicas, max_replicas=config.max_replicas
            ),
        )

    def run(self, stopped: threading.Event) -> None:
        """Turns until it is stopped; a turn that fails is tried again, after ever longer pauses."""
        pause_s = TURN_S
        while not stopped.is_set():
            try:
                self.turn()
                pause_s, self.report.problem = TURN_S, ""
            except Exception as error:  # also what Ray raises: none of it may end the loop
                ours = isinstance(error, MeshError)
                said = error.message if isinstance(error, MeshError) else repr(error)
                if said != self.report.problem:
                    _log.warning("scaling: %s; it is tried again", said, exc_info=not ours)
                self.report.problem = said
                pause_s = min(2 * pause_s, MOST_PAUSE_S)
            stopped.wait(pause_s)
        try:
            control.take_lease(self._controller, self._owner, 0.0, self.report)
        except MeshError as error:
            _log.warning("the lease runs out by itself: %s", error.message)

    def turn(self) -> None:
        """Looks once, and does what is to be done. Raises what keeps a step from being done."""
        self._renew()
        fleet = control.get_fleet(self._controller)
        members = self._members(fleet, self._servers.names())
        decision = self._decide(fleet, members)
        counts = control.counts(self._controller)
        steps = next_steps(members, decision.replicas, self._plan, counts)
        for step in steps:
            self._do(step)
        if not steps and not any(member.is_starting for member in members):
            self._adjust(members, decision, counts)

    def _renew(self) -> None:
        """Keeps the lease. Raises LeaseLostError when another has it."""
        self._fence = control.take_lease(self._controller, self._owner, LEASE_S, self.report)
        self._renewed_at = self._clock()

    def _members(self, fleet: pb.GetFleetResponse, ours: set[str]) -> list[Member]:
        now = self._clock()
        seen = {entry.server.server_id: entry for entry in fleet.servers}
        states = {name: entry.server.state for name, entry in seen.items()}
        states |= dict.fromkeys(ours - seen.keys(), "asked")
        self._since = {
            (name, state): self._since.get((name, state), now) for name, state in states.items()
        }
        return [
            Member(
                name=name,
                state=state,
                node=seen[name].server.node if name in seen else "",
                holds=frozenset(slots_of(seen[name].layers)) if name in seen else frozenset(),
                rate=(seen[name].server.rate or 1.0) if name in seen else 1.0,
                is_ours=name in ours,
                for_s=now - self._since[name, state],
            )
            for name, state in sorted(states.items())
        ]

    def _decide(self, fleet: pb.GetFleetResponse, members: Sequence[Member]) -> Decision:
        running = sum(member.is_running for member in members)
        starting = sum(member.is_starting for member in members)
        context = Context(
            now_s=self._clock(),
            running=running,
            starting=starting,
            experts=self._plan.experts,
            slots=self._plan.slots,
            sample=self._looks.sample(fleet.servers),
        )
        bounds = fleet.bounds
        config = bounded(self._config, bounds.min_replicas, bounds.max_replicas)
        decision, self._state = decide(context, config, self._state)
        if decision.replicas != self.report.replicas:
            _log.info("%d servers are wanted, %d run and %d start: %s", decision.replicas, running,
                      starting, decision.reason)  # fmt: skip
        self.report.replicas, self.report.reason = decision.replicas, decision.reason
        self.report.starting = starting
        return decision

    def _do(self, step: Step) -> None:
        self._require_lease()
        match step:
            case Start(name, slots):
                _log.info("asking Ray for server %s: %d slots", name, len(slots))
                self._servers.start(name, slots)
            case End(name, why):
                _log.info("ending server %s: %s", name, why)
                self._servers.end(name, graceful=("asked" not in self._states_of(name)))
            case Drain(name, moves):
                _log.info("draining server %s: %d moves", name, len(moves))
                self._wait(control.begin_drain(self._controller, name, moves, self._fence))

    def _states_of(self, name: str) -> set[str]:
        return {state for server, state in self._since if server == name}

    def _require_lease(self) -> None:
        """Raises LeaseLostError when it may have run out since: Ray knows no fencing numbers."""
        if self._clock() - self._renewed_at > LEASE_S / 2:
            raise LeaseLostError("the lease was not renewed in time", retry_after_s=TURN_S)

    def _wait(self, work: Future[Any]) -> None:
        """Waits for what the load controller does, and keeps the lease meanwhile."""
        while True:
            try:
                work.result(timeout=_RENEW_S)
                return
            except FutureTimeout:
                self._renew()

    def _adjust(self, members: Sequence[Member], decision: Decision, counts: Counts) -> None:
        """Drops copies in quiet hours, and brings them back after."""
        running = [member for member in members if member.is_running]
        holds = {member.name: member.holds for member in running}
        wanted = (decision.redundant, *sorted(holds))
        there = redundant_slots(holds, self._plan.room)
        if not holds or there == decision.redundant or wanted == self._adjusted:
            return
        nodes = {member.name: member.node for member in running}
        rates = {member.name: member.rate for member in running}
        moves = moves_to_have(decision.redundant, holds, nodes, counts, self._plan.room, rates)
        if moves:
            _log.info("%d redundant slots a layer are wanted, %d are there: %d moves",
                      decision.redundant, there, len(moves))  # fmt: skip
            self._require_lease()
            self._wait(control.begin_migration(self._controller, moves, fence=self._fence))
        self._adjusted = wanted
