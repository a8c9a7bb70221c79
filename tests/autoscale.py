"""A cluster as the autoscaler sees it."""

from __future__ import annotations

from collections.abc import Iterable

from expertmesh.config import AutoscaleConfig
from load_controller.autoscale import Context, Sample, State, decide

CONFIG = AutoscaleConfig(
    max_replicas=64,
    target_utilization=0.5,
    look_back_period_s=10.0,
    upscale_delay_s=30.0,
    downscale_delay_s=300.0,
)
EVERY_S = 5.0  # between two decisions


def make_context(
    now_s: float, running: int, utilization: float | None, *, starting: int = 0, **sample: float
) -> Context:
    """So many servers, so busy; all of them report if any does."""
    reporting = running if utilization is not None else 0
    measured = {"busiest": utilization, "reporting": reporting, **sample}
    return Context(
        now_s=now_s,
        running=running,
        starting=starting,
        experts=64,
        slots=16,
        sample=Sample(utilization=utilization, **measured),  # type: ignore[arg-type]
    )


class Cluster:
    """Servers that are there the moment they are decided on, offered some work."""

    def __init__(self, running: int, config: AutoscaleConfig = CONFIG, now_s: float = 0.0) -> None:
        self.running, self.config, self.now_s = running, config, now_s
        self.state: State | None = None

    def offer(self, work: Iterable[float | None]) -> list[int]:
        """The servers after each decision; `work` is in servers kept busy, None is not known."""
        seen = []
        for each in work:
            utilization = None if each is None else each / self.running
            context = make_context(self.now_s, self.running, utilization)
            decision, self.state = decide(context, self.config, self.state)
            self.running = decision.replicas
            self.now_s += EVERY_S
            seen.append(self.running)
        return seen
