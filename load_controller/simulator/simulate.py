"""A trace, step by step, under the planner and the autoscaler that a cluster runs. Pure.

What is the same code: `planner.plan_placement`, `forecast.observe`, `autoscale.decide`. What stands
in for the rest: queues (`queues`), servers that take time to start, load and drain (`fleet`), and
routers that divide an expert's rows over its copies, evenly or as the plan says.

The planner sees counts drawn from the trace's popularity (Poisson), not the popularity itself; the
autoscaler sees what servers measured since its last decision. A plan is in force once the server
that has most to load has loaded it; one is made at a time.

Shapes: L layers, S servers of the placement in force, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertmesh.config import AutoscaleConfig
from expertmesh.errors import ConfigError
from load_controller.autoscale import Context, State, decide
from load_controller.autoscale_state import Sample
from load_controller.forecast import Forecast, observe
from load_controller.planner import Placement, Plan, Server, plan_placement
from load_controller.simulator.fleet import Fleet, FleetSpec, name_of
from load_controller.simulator.measure import Meter
from load_controller.simulator.queues import Waiting, next_backlog, within
from load_controller.simulator.report import Report
from load_controller.simulator.rows import dispatched_maxvio
from load_controller.simulator.trace import Floats, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """What is decided, and how often."""

    servers: int  # at the start, and throughout without `autoscale`
    redundant: int = 32  # slots of a layer beyond one an expert; `autoscale` decides it otherwise
    autoscale: AutoscaleConfig | None = None
    known_work: tuple[tuple[float, float], ...] = ()  # peaks of the time before, as in State.peaks
    decide_every_s: float = 10.0
    plan_every_s: float = 600.0  # and whenever servers come or go (DeepSeek-V3: 10 minutes)
    half_life_s: float = 120.0  # of the forecast
    move_cost: float = 0.1
    least_gain: float = 0.01
    weighted: bool = False  # routers follow the plan's weights; else they divide evenly over copies


@dataclass(frozen=True, slots=True)
class _Layout:
    """A placement, and how rows are divided in it."""

    servers: tuple[int, ...]
    placement: Placement
    weights: Floats  # [L, S, E]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A plan whose slots are being loaded."""

    layout: _Layout
    at_s: float


def simulate(trace: Trace, spec: FleetSpec, control: Control, seed: int = 0) -> Report:
    """Runs the whole trace. The same arguments give the same report.

    Begins with `control.servers` servers that hold the experts in contiguous runs, one slot each.
    Raises ConfigError where the servers do not hold the model.
    """
    run = _Run(trace, spec, control, seed)
    for step in range(len(trace.tokens_per_s)):
        run.step(step)
    return run.report()


class _Run:
    """The state of one simulation."""

    def __init__(self, trace: Trace, spec: FleetSpec, control: Control, seed: int) -> None:
        least = -(-trace.experts // spec.slots)
        if control.servers < least:
            raise ConfigError(
                f"{control.servers} servers of {spec.slots} slots do not hold {trace.experts} "
                f"experts: {least} do"
            )
        self._trace, self._spec, self._control = trace, spec, control
        self._rng = np.random.default_rng(seed)
        self._fleet = Fleet(spec)
        self._fleet.start(control.servers, -spec.startup_s)
        self._fleet.advance(0.0)
        self._layout = _contiguous(tuple(self._fleet.serving), trace)
        self._backlog_s = np.zeros(control.servers)
        self._pending: _Pending | None = None
        self._leaving: set[int] = set()
        self._redundant = control.redundant
        self._forecast: Forecast | None = None
        self._state: State | None = None
        if control.known_work:
            self._state = State(
                replicas=control.servers, at_s=0.0, reason="", peaks=control.known_work
            )
        self._counts = np.zeros((trace.layers, trace.experts))
        self._planned_at_s = -np.inf
        self._divided_at_s = -1.0  # when `_loads` were right
        self._loads = np.zeros((0, 0))
        self._decide_steps = max(1, round(control.decide_every_s / trace.step_s))
        self.meter = Meter(len(trace.tokens_per_s))

    def step(self, step: int) -> None:
        """One step: servers come and go, requests wait, counts are taken, decisions are made."""
        trace, now_s = self._trace, step * self._trace.step_s
        self._fleet.advance(now_s)
        if self._pending is not None and self._pending.at_s <= now_s:
            self._install(self._pending.layout, now_s)
        tokens = float(trace.tokens_per_s[step])
        popularity = trace.popularity_at(now_s)
        loads = self._divide(popularity, now_s)
        share = loads.mean(0)
        utilization = tokens * share / self._spec.tokens_per_s
        before = self._backlog_s
        self._backlog_s = next_backlog(
            before, utilization, trace.step_s, self._spec.service, self._rng
        )
        waiting = Waiting((before + self._backlog_s) / 2, utilization, share)
        fanout = min(trace.top_k, len(share))
        below = within(waiting, trace.step_s, self._spec.service, fanout)
        self.meter.take(step, tokens, loads, waiting, below, self._fleet.paid,
                        float(self._layout.placement.holds.sum((1, 2)).mean()))  # fmt: skip
        self._counts += self._rng.poisson(tokens * trace.step_s * trace.top_k * popularity)
        if (step + 1) % self._decide_steps == 0:
            self._control_at(now_s + trace.step_s)

    def report(self) -> Report:
        """After the last step."""
        trace = self._trace
        last = trace.popularity_at(trace.duration_s - trace.step_s)
        holds = self._layout.placement.holds
        dispatched = dispatched_maxvio(last, trace.top_k, holds, np.random.default_rng(0))
        return self.meter.report(trace, self._spec, dispatched)

    def _divide(self, popularity: Floats, now_s: float) -> Floats:
        """[L, S]: the part of each layer's pairs that each server gets."""
        at_s = min(now_s, float(self._trace.keyframes_s[-1]))  # after that nothing drifts
        if at_s != self._divided_at_s:
            self._divided_at_s = at_s
            self._loads = np.matmul(self._layout.weights, popularity[:, :, None])[:, :, 0]
        return self._loads

    def _control_at(self, now_s: float) -> None:
        """What the load controller does once in a while."""
        windows = self._control.half_life_s / (self._decide_steps * self._trace.step_s)
        if self._counts.any():
            self._forecast = observe(self._forecast, self._counts, windows)
        self._counts = np.zeros_like(self._counts)
        if self._control.autoscale is not None:
            self._scale(self._control.autoscale, now_s)
        members = tuple(s for s in self._fleet.serving if s not in self._leaving)
        due = now_s - self._planned_at_s >= self._control.plan_every_s
        changed = members != self._layout.servers
        if self._pending is None and self._forecast is not None and (due or changed):
            self._plan(self._forecast.load, members, now_s)

    def _scale(self, config: AutoscaleConfig, now_s: float) -> None:
        fleet, placed = self._fleet, set(self._layout.servers)
        ready = [s for s in fleet.serving if s not in self._leaving]
        running = sum(s in placed for s in ready)
        sample: Sample = self.meter.sample(self._spec.service, running)
        context = Context(
            now_s=now_s,
            running=running,
            starting=len(fleet.starting) + len(ready) - running,
            experts=self._trace.experts,
            slots=self._spec.slots,
            sample=sample,
        )
        decision, self._state = decide(context, config, self._state)
        self._redundant = decision.redundant
        change = decision.replicas - running - context.starting
        if change > 0:
            stay = sorted(self._leaving)[:change]
            self._leaving -= set(stay)
            fleet.start(change - len(stay), now_s)
        elif change < 0:
            surplus = -change - fleet.cancel(-change)
            self._leaving |= set(sorted(ready, reverse=True)[:surplus])
        self.meter.scalings += change != 0

    def _plan(self, load: Floats, members: tuple[int, ...], now_s: float) -> None:
        self._planned_at_s = now_s
        slots = self._spec.slots
        room = len(members) * min(slots, self._trace.experts) - self._trace.experts
        plan = plan_placement(
            load,
            [Server(name=name_of(server), capacity=slots) for server in members],
            max(0, min(self._redundant, room)),
            self._layout.placement,
            move_cost=self._control.move_cost,
            least_gain=self._control.least_gain,
            weighted=self._control.weighted,
        )
        layout = _Layout(members, plan.placement, plan.weights)
        loaded = self._loading_s(plan, members)
        self.meter.plan(plan)
        if loaded == 0 and members == self._layout.servers:
            self._install(layout, now_s)
        else:
            self._pending = _Pending(layout, now_s + loaded)

    def _loading_s(self, plan: Plan, members: tuple[int, ...]) -> float:
        """Seconds until the server with most to load has it."""
        before = self._layout.placement.on(plan.placement.servers)
        most = int((plan.placement.holds & ~before).sum((0, 2)).max())
        scale = self._spec.model_layers / self._trace.layers
        return most * scale * self._spec.expert_bytes / self._spec.load_bytes_per_s

    def _install(self, layout: _Layout, now_s: float) -> None:
        """The plan is in force: queues stay where they are, servers that are out of it drain."""
        waits = dict(zip(self._layout.servers, self._backlog_s.tolist(), strict=True))
        for server in set(self._layout.servers) - set(layout.servers):
            self._fleet.drain(server, now_s, waits[server])
            self._leaving.discard(server)
        self._backlog_s = np.array([waits.get(server, 0.0) for server in layout.servers])
        self._layout, self._pending, self._divided_at_s = layout, None, -1.0
        self.meter.install()


def _contiguous(servers: tuple[int, ...], trace: Trace) -> _Layout:
    """Experts in runs of about equal length, one run a server, as a new cluster has them."""
    owner = np.arange(trace.experts) * len(servers) // trace.experts
    holds = np.zeros((trace.layers, len(servers), trace.experts), np.bool_)
    holds[:, owner, np.arange(trace.experts)] = True
    placement = Placement(tuple(name_of(server) for server in servers), holds)
    return _Layout(servers, placement, holds.astype(np.float64))
