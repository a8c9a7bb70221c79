"""Load counts that duplicates, reordering, loss and restarts cannot change. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertmesh.errors import InvalidRequestError

Counts = npt.NDArray[np.int64]


class SourceKey(NamedTuple):
    """One run of one router or server."""

    source: str
    incarnation: str


@dataclass(frozen=True)
class Report:
    """One source's totals since it started, by layer."""

    key: SourceKey
    sequence: int
    totals: Mapping[int, Counts]


class Ledger:
    """The sum of all sources' totals.

    A report replaces its source's earlier one; an older or repeated report (by sequence) is
    dropped. What a source had reported before it died stays counted. A layer that a report leaves
    out is as it was.
    """

    def __init__(self) -> None:
        self._reports: dict[SourceKey, Report] = {}
        self._totals: dict[int, Counts] = {}

    def take(self, report: Report) -> dict[int, Counts] | None:
        """Adds a report. Returns what is new by layer, or None for an old or repeated one."""
        news = self.news(report)
        if news is not None:
            self.add(report, news)
        return news

    def news(self, report: Report) -> dict[int, Counts] | None:
        """What a report would add by layer, None for an old or repeated one; changes nothing.

        Raises InvalidRequestError for totals that cannot be.
        """
        before = self._reports.get(report.key)
        if before is not None and report.sequence <= before.sequence:
            return None
        told = before.totals if before is not None else {}
        return {
            layer: self._new(report.key, layer, total, told.get(layer))
            for layer, total in report.totals.items()
        }

    def add(self, report: Report, news: Mapping[int, Counts]) -> None:
        """Adds a report, with what `news` has just said of it."""
        before = self._reports.get(report.key)
        told = before.totals if before is not None else {}
        self._reports[report.key] = replace(report, totals={**told, **report.totals})
        for layer in news:
            known = self._totals.get(layer)
            self._totals[layer] = news[layer].copy() if known is None else known + news[layer]

    def _new(self, key: SourceKey, layer: int, total: Counts, told: Counts | None) -> Counts:
        """What a source's total adds to what it had told. Raises InvalidRequestError."""
        known = self._totals.get(layer)
        if known is not None and len(known) != len(total):
            raise InvalidRequestError(
                f"{key.source} reports {len(total)} numbers for layer {layer}, where others "
                f"report {len(known)}: every source must serve the same model",
                field="layers",
            )
        new = total if told is None else total - told
        if (new < 0).any():
            least = int(new.argmin())
            raise InvalidRequestError(
                f"{key.source} reports {int(total[least])} in layer {layer}, "
                f"{-int(new[least])} less than before: totals of one incarnation only grow",
                field="layers",
            )
        return new

    def totals(self) -> dict[int, Counts]:
        """Counts by layer, over every source that ever reported."""
        return dict(self._totals)


class Window:
    """Counts of one layer since its last bias update."""

    def __init__(self, experts: int, top_k: int, opened_at: float) -> None:
        self.counts = np.zeros(experts, np.int64)
        self.top_k = max(1, top_k)
        self.opened_at = opened_at

    def copy(self) -> Window:
        """The same, which later counts do not change."""
        window = Window(0, self.top_k, self.opened_at)
        window.counts = self.counts.copy()
        return window

    @property
    def tokens(self) -> float:
        """Tokens counted so far."""
        return float(self.counts.sum()) / self.top_k

    def is_due(self, now: float, window_tokens: int, window_s: float) -> bool:
        """Whether it closes: enough tokens, or enough time and at least one token."""
        return self.tokens >= window_tokens or (
            now - self.opened_at >= window_s and bool(self.counts.any())
        )
