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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from expertmesh import gating
from expertmesh.model import GateSpec

#: Fewer rows judge nothing: with 8 experts a row, 64 rows know 5 % to one part in five.
MIN_ROWS = 64
_ERRORS = 2.0  # standard errors between an admitted share and the ceiling
_BATCH_ROWS = 512  # judged together: what a core's cache holds of 256 experts
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

    def __init__(self, scores_TE: torch.Tensor, own_TE: torch.Tensor | None = None) -> None:
        """`own_TE` is what the rows choose, as a mask, where that is known."""
        self.scores_TE = scores_TE
        self.known_own_TE = own_TE

    def own(self, gate: Gate) -> torch.Tensor:
        """What the rows choose under the trained bias alone: bool [T, E]."""
        if self.known_own_TE is None:
            self.known_own_TE = own_choices([(self.scores_TE, gate)])[0]
        return self.known_own_TE

    def divergence(self, delta_E: torch.Tensor, gate: Gate) -> Share:
        """How much of what these rows choose the delta would change."""
        return _divergences([_Question(delta_E, gate, self)])[0]


class Candidate(NamedTuple):
    """A delta that shall be judged, and on what."""

    delta: torch.Tensor  # [E] float32
    gate: Gate
    samples: Sequence[Sample]


def judge(delta_E: torch.Tensor, gate: Gate, samples: Sequence[Sample], ceiling: float) -> Verdict:
    """Cuts a delta until none of the samples puts it above the ceiling."""
    return judge_all([Candidate(delta_E, gate, samples)], ceiling)[0]


def judge_all(candidates: Sequence[Candidate], ceiling: float) -> list[Verdict]:
    """`judge` for many layers: a model's layers close their windows together."""
    if not all(candidate.samples for candidate in candidates):
        raise ValueError("a delta cannot be judged without a sample")
    first = _worst(candidates)
    shares, halvings = list(first), [0] * len(first)
    deltas = [candidate.delta for candidate in candidates]
    withdrawn = [share.value >= 2 * ceiling for share in first]
    above = [i for i, share in enumerate(first) if share.upper > ceiling and not withdrawn[i]]
    while above:
        for i in above:
            deltas[i], halvings[i] = deltas[i] / 2, halvings[i] + 1
            if float(deltas[i].abs().max()) < _NOTHING:
                deltas[i] = torch.zeros_like(deltas[i])
        halved = _worst([candidates[i]._replace(delta=deltas[i]) for i in above])
        for i, share in zip(above, halved, strict=True):
            shares[i] = share
        above = [i for i in above if shares[i].upper > ceiling]
    return [
        Verdict(torch.zeros_like(delta) if taken else delta, share, halved_often, taken)
        for delta, share, halved_often, taken in zip(
            deltas, first, halvings, withdrawn, strict=True
        )
    ]


def _worst(candidates: Sequence[Candidate]) -> list[Share]:
    """Of each candidate, the share in the sample that it changes most."""
    asked = [
        _Question(candidate.delta, candidate.gate, sample)
        for candidate in candidates
        for sample in candidate.samples
    ]
    shares = iter(_divergences(asked))
    return [
        max((next(shares) for _ in candidate.samples), key=lambda share: share.upper)
        for candidate in candidates
    ]


class _Question(NamedTuple):
    """How much of a sample does a delta change?"""

    delta: torch.Tensor
    gate: Gate
    sample: Sample


def _divergences(asked: Sequence[_Question]) -> list[Share]:
    """The answers, worked out for many samples at a time: one by one they cost as many calls."""
    shares: list[Share] = []
    for batch in _batches([(each.sample.scores_TE, each.gate) for each in asked]):
        part = asked[batch.start : batch.stop]
        own_TE = torch.cat([each.sample.own(each.gate) for each in part])
        bias_TE = batch.by_row([each.gate.trained_bias + each.delta for each in part])
        changed_T = _changed(batch.scores, own_TE, bias_TE, batch.spec)
        counted = changed_T.split(batch.rows)
        shares += [Share(int(each.sum()), len(each) * batch.spec.top_k) for each in counted]
    return shares


def own_choices(sampled: Sequence[tuple[torch.Tensor, Gate]]) -> list[torch.Tensor]:
    """What rows of scores [T, E] choose under their gate's trained bias: masks [T, E]."""
    masks: list[torch.Tensor] = []
    for batch in _batches(sampled):
        bias_TE = batch.by_row([gate.trained_bias for _, gate in sampled[batch.start : batch.stop]])
        own_TE = gating.choice_mask(batch.scores, batch.spec, bias_TE)
        masks += own_TE.split(batch.rows)
    return masks


class _Batch(NamedTuple):
    """Samples `start` up to `stop` as one, T rows in all."""

    start: int
    stop: int
    spec: GateSpec
    rows: list[int]  # of each sample
    scores: torch.Tensor  # [T, E]

    def by_row(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A vector [E] for each sample, repeated for each of its rows: [T, E]."""
        repeats = torch.tensor(self.rows, device="cpu")
        return torch.stack(list(vectors)).repeat_interleave(repeats, dim=0)


def _batches(sampled: Sequence[tuple[torch.Tensor, Gate]]) -> Iterator[_Batch]:
    """Runs of samples of one rule and size, of about _BATCH_ROWS rows each."""
    start = rows = 0
    for at, (scores_TE, gate) in enumerate(sampled):
        first_TE, first = sampled[start]
        is_other = gate.spec != first.spec or scores_TE.shape[1] != first_TE.shape[1]
        if at > start and (is_other or rows + len(scores_TE) > _BATCH_ROWS):
            yield _batch(sampled, start, at)
            start, rows = at, 0
        rows += len(scores_TE)
    if sampled:
        yield _batch(sampled, start, len(sampled))


def _batch(sampled: Sequence[tuple[torch.Tensor, Gate]], start: int, stop: int) -> _Batch:
    scores = [scores_TE for scores_TE, _ in sampled[start:stop]]
    return _Batch(start, stop, sampled[start][1].spec, list(map(len, scores)), torch.cat(scores))


def _changed(
    scores_TE: torch.Tensor, own_TE: torch.Tensor, bias_TE: torch.Tensor, spec: GateSpec
) -> torch.Tensor:
    """How many of each row's picks under the bias are not its own: int64 [T].

    A row whose least own pick is above everything else picks the same again. That is cheap to see,
    and true of most rows; the others choose, and ties with them.
    """
    choice_TE = gating.in_groups(scores_TE + bias_TE, spec)
    least_T = choice_TE.masked_fill(~own_TE, math.inf).amin(1)
    most_T = choice_TE.masked_fill(own_TE, -math.inf).amax(1)
    changed_T = torch.zeros(len(scores_TE), dtype=torch.int64, device="cpu")
    rows_R = torch.nonzero(~(least_T > most_T))[:, 0]  # not "<=": NaN is neither
    if len(rows_R):
        ids_RK = gating.choose(scores_TE[rows_R], spec, bias_TE[rows_R])
        changed_T[rows_R] = spec.top_k - own_TE[rows_R].gather(1, ids_RK).sum(1)
    return changed_T


class HeldSamples:
    """The newest rows of scores of one layer, from each router apart.

    A report of MIN_ROWS or more replaces what the router had sent before; a smaller one is filled
    up with its older rows. So a change of the traffic is seen whole, not mixed with what was.
    """

    def __init__(self, stale_s: float) -> None:
        """Samples older than the newest by `stale_s` are of routers that serve nothing now."""
        self._stale_s = stale_s
        self._samples: dict[str, tuple[float, Sample]] = {}

    def add(
        self, source: str, scores_TE: torch.Tensor, now: float, own_TE: torch.Tensor | None = None
    ) -> None:
        """Takes the rows that one router has sampled since its last report.

        `own_TE` is what they choose by themselves, where the caller knows (`own_choices`).
        """
        if len(scores_TE) < MIN_ROWS and source in self._samples:
            before = self._samples[source][1]
            scores_TE = torch.cat((before.scores_TE, scores_TE))[-MIN_ROWS:]
            if own_TE is not None and before.known_own_TE is not None:
                own_TE = torch.cat((before.known_own_TE, own_TE))[-MIN_ROWS:]
            else:
                own_TE = None
        self._samples[source] = (now, Sample(scores_TE, own_TE))

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
