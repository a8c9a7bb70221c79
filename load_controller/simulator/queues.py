"""How long requests wait: one queue a server. Pure; numpy only, and the same for the same seed.

Every server is one device that takes its requests in turn, each for `service_s` on average with
coefficient of variation `cv`; requests come at random (Poisson). That is an M/G/1 queue, taken in
two scales of time:

* *From step to step* the work that waits is carried on. In a step of dt a server with utilisation
  rho is brought rho dt + sqrt(rho dt service_s (1 + cv^2)) z seconds of work, z standard normal
  (mean and variance of a compound Poisson sum), and does dt: what does not fit waits. So overload,
  its length and its draining are followed exactly in the mean.
* *Within a step* a request waits for what was carried on (the mean of the step's begin and end) and
  for the requests just before it: more than t with the probability rho exp(-t / tau),
  tau = service_s (1 + cv^2) / (2 (1 - rho)). That is exact for exponential service (cv = 1) and has
  the mean of Pollaczek and Khinchine for any other. rho is taken as no more than
  1 - sqrt(service_s (1 + cv^2) / dt), beyond which such a queue is longer in the making than a
  step: the first scale makes it.

A request waits for the slowest of its `fanout` parts, which are taken as independent draws from the
servers in proportion to their load. Real parts of one batch are not independent; a batch of many
rows visits every server.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from load_controller.simulator.trace import Floats

#: Edges of the delays that are told apart: 24 to a decade, so quantiles are exact to 10 %.
EDGES_S = np.concatenate([[0.0], np.geomspace(1e-4, 1e5, 9 * 24 + 1)])


@dataclass(frozen=True, slots=True)
class Service:
    """What one server takes for one request."""

    service_s: float
    cv: float = 1.0

    @property
    def spread_s(self) -> float:
        """service_s (1 + cv^2), the second moment over the mean."""
        return self.service_s * (1 + self.cv**2)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The queues of one step."""

    work_s: Floats  # [S] carried on, mean of begin and end
    utilization: Floats  # [S] offered
    share: Floats  # [S] of the requests, sums to 1


def next_backlog(
    backlog_s: Floats, utilization: Floats, step_s: float, service: Service,
    rng: np.random.Generator,
) -> Floats:  # fmt: skip
    """[S] seconds of work that wait at the end of a step."""
    spread = np.sqrt(utilization * step_s * service.spread_s)
    brought = utilization * step_s + spread * rng.standard_normal(len(backlog_s))
    return np.maximum(0.0, backlog_s + np.maximum(0.0, brought) - step_s)


def within(waiting: Waiting, step_s: float, service: Service, fanout: float) -> Floats:
    """[edges]: which part of a step's requests waits no longer than each of EDGES_S."""
    most = max(0.0, 1 - np.sqrt(service.spread_s / step_s))
    busy = np.minimum(waiting.utilization, most)
    tau = service.spread_s / 2 / (1 - busy)
    over = EDGES_S - waiting.work_s[:, None]  # [S, edges]
    below = np.where(over < 0, 0.0, 1 - busy[:, None] * np.exp(-np.maximum(over, 0) / tau[:, None]))
    return np.asarray((waiting.share @ below) ** fanout)


@dataclass(slots=True)
class Delays:
    """The delays of all requests so far, as a distribution."""

    total: float = 0.0
    below: Floats = field(default_factory=lambda: np.zeros(len(EDGES_S)))

    def add(self, requests: float, part_below: Floats) -> None:
        """Adds a step's requests, distributed as `within` says."""
        self.total += requests
        self.below += requests * part_below

    def quantile(self, share: float) -> float:
        """Seconds that `share` of the requests do not exceed, to the next edge; 0 without any."""
        return quantile(self.below / self.total, share) if self.total > 0 else 0.0


def quantile(part_below: Floats, share: float) -> float:
    """The least of EDGES_S that `share` of the requests do not exceed; interpolated between two."""
    at = int(np.searchsorted(part_below, share - 1e-12))
    if at == 0:
        return 0.0
    if at == len(EDGES_S):
        return float("inf")
    low, high = part_below[at - 1 : at + 1]
    start, end = EDGES_S[at - 1 : at + 1]
    return float(start + (end - start) * (share - low) / max(high - low, 1e-300))
