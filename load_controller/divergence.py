"""What a serving delta would change, judged on sampled scores before it is published. Pure.

    divergence = picks that the trained bias alone would not have made / all picks

over the rows of a sample; a pick is one (token, expert). Above the ceiling c the delta is halved
until it is under it; at 2 c or more it is taken back whole. A sample of n picks knows a share p to
about sqrt(p (1 - p) / n), so "above" is asked of p plus twice that: what is admitted is under the
ceiling on the traffic, not only on the sample. Where several routers sampled, the worst one counts.

T sampled rows, E experts of the layer, K picks a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from expertmesh import gating
from expertmesh.model import GateSpec

#: Fewer rows judge nothing: with 8 experts a row, 64 rows know 5 % to one part in five.
MIN_ROWS = 64
_ERRORS = 2.0  # standard errors between an admitted share and the ceiling
_NOTHING = 1e-7  # a halved delta below this moves no float32 score: it is zero


@dataclass(frozen=True, slots=True)
class Gate:
    """How one layer chooses: its rule, and its trained bias [E] float32, which is never written."""

    spec: GateSpec
    trained_bias: torch.Tensor


class Share(NamedTuple):
    """A measured divergence."""

    changed: int
    picks: int

    @property
    def value(self) -> float:
        """Changed picks by all picks; 0 where nothing was measured."""
        return self.changed / self.picks if self.picks else 0.0

    @property
    def upper(self) -> float:
        """What the share is below, but for one sample in forty."""
        if not self.picks:
            return 0.0
        return self.value + _ERRORS * math.sqrt(self.value * (1.0 - self.value) / self.picks)


UNMEASURED = Share(0, 0)


class Verdict(NamedTuple):
    """A delta that may be published, and what was done to it."""

    delta: torch.Tensor  # [E] float32
    share: Share  # of the candidate, before any cut
    halvings: int
    withdrawn: bool


class Sample:
    """Rows of scores, and what they choose by themselves, which is worked out once."""

    def __init__(self, scores_TE: torch.Tensor) -> None:
        self.scores_TE = scores_TE
        self._own_TE: torch.Tensor | None = None

    def divergence(self, delta_E: torch.Tensor, gate: Gate) -> Share:
        """How much of what these rows choose the delta would change."""
        if self._own_TE is None:
            self._own_TE = gating.choice_mask(self.scores_TE, gate.spec, gate.trained_bias)
        ids_TK = gating.choose(self.scores_TE, gate.spec, gate.trained_bias + delta_E)
        return Share(gating.changed_picks(ids_TK, self._own_TE), ids_TK.numel())


def judge(delta_E: torch.Tensor, gate: Gate, samples: Sequence[Sample], ceiling: float) -> Verdict:
    """Cuts a delta until none of the samples puts it above the ceiling."""
    if not samples:
        raise ValueError("a delta cannot be judged without a sample")
    first = _worst(delta_E, gate, samples)
    if first.value >= 2 * ceiling:
        return Verdict(torch.zeros_like(delta_E), first, 0, True)
    share, halvings = first, 0
    while share.upper > ceiling:
        delta_E, halvings = delta_E / 2, halvings + 1
        if float(delta_E.abs().max()) < _NOTHING:
            delta_E = torch.zeros_like(delta_E)
        share = _worst(delta_E, gate, samples)
    return Verdict(delta_E, first, halvings, False)


def _worst(delta_E: torch.Tensor, gate: Gate, samples: Sequence[Sample]) -> Share:
    shares = [sample.divergence(delta_E, gate) for sample in samples]
    return max(shares, key=lambda share: share.upper)


class HeldSamples:
    """The newest rows of scores of one layer, from each router apart.

    A report of MIN_ROWS or more replaces what the router had sent before; a smaller one is filled
    up with its older rows. So a change of the traffic is seen whole, not mixed with what was.
    """

    def __init__(self, stale_s: float) -> None:
        """Samples older than the newest by `stale_s` are of routers that serve nothing now."""
        self._stale_s = stale_s
        self._samples: dict[str, tuple[float, Sample]] = {}

    def add(self, source: str, scores_TE: torch.Tensor, now: float) -> None:
        """Takes the rows that one router has sampled since its last report."""
        if len(scores_TE) < MIN_ROWS and source in self._samples:
            before_TE = self._samples[source][1].scores_TE
            scores_TE = torch.cat((before_TE, scores_TE))[-MIN_ROWS:]
        self._samples[source] = (now, Sample(scores_TE))

    def drop(self, source: str) -> None:
        """That router is gone."""
        self._samples.pop(source, None)

    def usable(self) -> list[Sample]:
        """What can be judged on; empty as long as no router has sent MIN_ROWS rows."""
        newest = max((at for at, _ in self._samples.values()), default=0.0)
        return [
            sample
            for at, sample in self._samples.values()
            if len(sample.scores_TE) >= MIN_ROWS and at >= newest - self._stale_s
        ]
