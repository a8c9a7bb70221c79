"""What a simulation measures while it runs: for the autoscaler, and for the report. Pure."""

from __future__ import annotations

import numpy as np

from load_controller.autoscale_state import Sample
from load_controller.planner import Plan
from load_controller.simulator.fleet import FleetSpec
from load_controller.simulator.queues import EDGES_S, Delays, Service, Waiting, quantile
from load_controller.simulator.report import Report, Timeline, mean_by
from load_controller.simulator.trace import Floats, Trace

#: Columns of the timeline, in its order.
_COLUMNS = ("tokens", "paid", "placed", "utilization", "maxvio", "slots", "delay_p99_s")


class Meter:
    """Sums over all steps, and over those since the last sample."""

    def __init__(self, steps: int) -> None:
        self._steps = {name: np.zeros(steps) for name in _COLUMNS}
        self._delays = Delays()
        self._overloaded = 0.0
        self._worst_last = 0.0
        self._planned_from: int | None = None
        self._now = 0
        self._since: list[tuple[float, Waiting, Floats]] = []
        self.plans = self.loads = self.scalings = 0

    def take(
        self, step: int, tokens: float, loads: Floats, waiting: Waiting, below: Floats, paid: int,
        slots: float,
    ) -> None:  # fmt: skip
        """One step. `loads` [L, S] are the parts of each layer's pairs; `below` is `within`."""
        self._now = step
        self._delays.add(tokens, below)
        self._since.append((tokens, waiting, below))
        uneven = loads.max(1) * loads.shape[1] - 1.0
        over = waiting.utilization > 1
        self._overloaded += tokens * float(waiting.share[over].sum())
        self._worst_last = float(uneven.max())
        now = (tokens, paid, loads.shape[1], waiting.utilization.mean(), uneven.mean(), slots,
               quantile(below, 0.99))  # fmt: skip
        for column, value in zip(self._steps.values(), now, strict=True):
            column[step] = value

    def plan(self, plan: Plan) -> None:
        """A plan was made."""
        if plan.moves:
            self.plans += 1
            self.loads += sum(move.action == "load" for move in plan.moves)

    def install(self) -> None:
        """A plan is in force from the next step on."""
        if self._planned_from is None:
            self._planned_from = self._now + 1

    def sample(self, service: Service, running: int) -> Sample:
        """What servers measured since the last sample; the mean over their steps."""
        steps, self._since = self._since, []
        if not steps:
            return Sample()
        utilization = np.mean([w.utilization.mean() for _, w, _ in steps])
        busiest = np.mean([w.utilization.max() for _, w, _ in steps])
        ongoing = np.mean([_ongoing(w, service).mean() for _, w, _ in steps])
        requests = sum(tokens for tokens, _, _ in steps)
        delay_s = 0.0
        if requests > 0:
            below = sum(tokens * below for tokens, _, below in steps) / requests
            delay_s = min(quantile(np.asarray(below), 0.99), float(EDGES_S[-1]))
        return Sample(
            utilization=float(utilization),
            busiest=float(busiest),
            ongoing=float(ongoing),
            queue_delay_s=delay_s,
            reporting=running,
        )

    def report(self, trace: Trace, spec: FleetSpec, dispatched: float | None) -> Report:
        """After the last step."""
        columns, hours = self._steps, trace.duration_s / 3600
        step_h = trace.step_s / 3600
        tokens, slots = columns["tokens"], columns["slots"]
        planned = slice(len(tokens) if self._planned_from is None else self._planned_from, None)
        at_s = np.arange(len(tokens), dtype=np.float64) * trace.step_s
        frames = [trace.popularity_at(float(at)) for at in at_s]
        uneven = np.array([(f.max(1) * trace.experts - 1).mean() for f in frames])
        return Report(
            trace=trace.name,
            hours=hours,
            server_hours=float(columns["paid"].sum()) * step_h,
            servers=(int(columns["paid"].min()), float(columns["paid"].mean()),
                     int(columns["paid"].max())),
            slot_hours=float(slots.sum()) * step_h,
            redundant_hours=float((slots - trace.experts).sum()) * step_h,
            maxvio_experts=mean_by(uneven, tokens),
            maxvio_before=float(columns["maxvio"][0]),
            maxvio_after=mean_by(columns["maxvio"][planned], tokens[planned]),
            maxvio_last=self._worst_last,
            maxvio_dispatched=dispatched,
            plans=self.plans,
            loads=self.loads,
            loaded_bytes=self.loads * spec.expert_bytes * spec.model_layers / trace.layers,
            scalings=self.scalings,
            delay_p50_s=self._delays.quantile(0.5),
            delay_p99_s=self._delays.quantile(0.99),
            overloaded=self._overloaded / max(float(tokens.sum()), 1e-300),
            timeline=Timeline(at_s, *columns.values()),
        )  # fmt: skip


def _ongoing(waiting: Waiting, service: Service) -> Floats:
    """[S] requests waiting or computing, by Little's law."""
    busy = np.minimum(waiting.utilization, 1.0)
    near = np.minimum(busy, 0.99)
    mean_s = waiting.work_s + near * service.spread_s / 2 / (1 - near)
    return np.asarray(busy + waiting.utilization / service.service_s * mean_s)
