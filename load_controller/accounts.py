"""The cluster's counts: reports of routers and servers to exact totals, kept in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from expertmesh.errors import InvalidRequestError
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2
from load_controller.balancer import max_violation
from load_controller.divergence import Share
from load_controller.ledger import Counts, Ledger, Report, SourceKey
from load_controller.store import Store

#: What a source reports, as the store names it.
ROUTER, EXECUTIONS = "router", "executions"


@dataclass(frozen=True)
class News:
    """A report that brings something new: saved first, added when that is certain."""

    kind: str
    report: Report
    rows: Mapping[int, Counts]  # what each layer's numbers grow by
    top_k: Mapping[int, int]

    @property
    def assignments(self) -> dict[int, Counts]:
        """What the report adds to the assignments of the routers' gate, by layer: [E]."""
        return {layer: row[: _experts(row)] for layer, row in self.rows.items()}


class Accounts:
    """Totals over every source that ever reported.

    Four counts that are never added together: assignments by the routers' gate and by callers',
    pairs that routers sent again, rows that servers executed. A router's three are one row of
    numbers in the ledger, so that no report is ever half taken.
    """

    def __init__(self, store: Store) -> None:
        """Takes up what the store has."""
        self._store = store
        self._ledgers = {kind: Ledger() for kind in (ROUTER, EXECUTIONS)}
        for kind, ledger in self._ledgers.items():
            for report in store.reports(kind):
                ledger.take(report)
        # [changed, sampled] picks. Not stored: it says what is, not what was.
        self._shares = Ledger()
        self.top_k: dict[int, int] = {}
        #: Since this process started, by kind: reports that brought news, and old ones.
        self.reports_taken = dict.fromkeys(self._ledgers, 0)
        self.reports_dropped = dict.fromkeys(self._ledgers, 0)

    def read_assignments(self, request: pb.ReportAssignmentsRequest) -> News | None:
        """What a router's report brings; None for an old or repeated one.

        Raises InvalidRequestError for totals that cannot be.
        """
        totals = {entry.layer: _router_row(entry) for entry in request.layers}
        top_k = {entry.layer: entry.top_k for entry in request.layers}
        return self._read(ROUTER, _report(request, totals), top_k)

    def take_shares(self, request: pb.ReportAssignmentsRequest) -> dict[int, Share]:
        """What a report that is not an old one adds to the sampled picks, by layer."""
        totals = {
            sample.layer: np.array([sample.changed_picks, sample.sampled_picks])
            for sample in request.samples
        }
        news = self._shares.take(_report(request, totals)) or {}
        return {layer: Share(*new.tolist()) for layer, new in news.items()}

    def take_executions(self, request: pb.ReportExecutionsRequest) -> None:
        """Takes a server's totals. Raises InvalidRequestError, and UnavailableError where they
        cannot be stored; then nothing was taken."""
        totals = {entry.layer: _array(entry.counts) for entry in request.layers}
        news = self._read(EXECUTIONS, _report(request, totals), {})
        if news is not None:
            self.save(news)
            self.add(news)

    def _read(self, kind: str, report: Report, top_k: Mapping[int, int]) -> News | None:
        rows = self._ledgers[kind].news(report)
        if rows is None:
            self.reports_dropped[kind] += 1
            return None
        return News(kind, report, rows, top_k)

    def save(self, news: News) -> None:
        """Stores a report. Raises UnavailableError."""
        self._store.save_report(news.kind, news.report)

    def add(self, news: News) -> None:
        """Counts a report that has been stored."""
        self._ledgers[news.kind].add(news.report, news.rows)
        self.reports_taken[news.kind] += 1
        self.top_k |= news.top_k

    def assignments(self) -> dict[int, Counts]:
        """Every layer's assignments so far, by either gate: [E]."""
        totals = self._ledgers[ROUTER].totals()
        return {
            layer: row[: _experts(row)] + row[_experts(row) : 2 * _experts(row)]
            for layer, row in totals.items()
        }

    def layer_loads(self) -> list[router_pb2.LayerLoad]:
        """Assignments of every layer that has any report."""
        loads = []
        for layer, row in sorted(self._ledgers[ROUTER].totals().items()):
            experts = _experts(row)
            gated, caller = row[:experts], row[experts : 2 * experts]
            loads.append(
                router_pb2.LayerLoad(
                    layer=layer,
                    counts=gated.tolist(),
                    caller_gated_counts=caller.tolist(),
                    max_violation=max_violation(gated + caller),
                    top_k=self.top_k.get(layer, 0),
                    repeated_pairs=int(row[-1]),
                )
            )
        return loads

    def layer_executions(self) -> list[pb.LayerExecutions]:
        """Executions of every layer that has any."""
        return [
            pb.LayerExecutions(layer=layer, counts=counts.tolist())
            for layer, counts in sorted(self._ledgers[EXECUTIONS].totals().items())
        ]


def _report(
    request: pb.ReportAssignmentsRequest | pb.ReportExecutionsRequest, totals: dict[int, Counts]
) -> Report:
    return Report(SourceKey(request.source, request.incarnation), request.sequence, totals)


def _router_row(entry: router_pb2.LayerLoad) -> Counts:
    """One layer of a router's report: gated [E], caller gated [E], repeated pairs [1]."""
    gated = _array(entry.counts)
    caller = _array(entry.caller_gated_counts) if entry.caller_gated_counts else 0 * gated
    if len(caller) != len(gated):
        raise InvalidRequestError(
            f"layer {entry.layer} has {len(gated)} counts and {len(caller)} caller gated ones",
            field="layers",
        )
    return np.concatenate((gated, caller, [entry.repeated_pairs]))


def _experts(row: Counts) -> int:
    return len(row) // 2


def _array(counts: Sequence[int]) -> Counts:
    return np.fromiter(counts, np.int64, len(counts))
