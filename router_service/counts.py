"""A router's own load counts: each (row, layer, expert) of an answer once, as it goes out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertmesh.model import ModelSpec
from expertmesh.v1 import control_pb2, router_pb2

#: Up to so many pairs Python's own loop counts sooner than numpy's calls.
_FEW_PAIRS = 16


class AssignmentCounts:
    """Totals since this router started. Used from one event loop."""

    def __init__(self, spec: ModelSpec) -> None:
        moe = [layer for layer in spec.layers if layer.num_experts]
        self._gated = {layer.index: np.zeros(layer.num_experts, np.int64) for layer in moe}
        self._caller = {layer.index: np.zeros(layer.num_experts, np.int64) for layer in moe}
        self._repeats = {layer.index: 0 for layer in moe}
        self._top_k = {layer.index: layer.top_k for layer in moe}
        self.version = 0
        self.answered_requests = 0
        self.answered_rows = 0
        self.retried_pairs = 0

    def add(
        self, layer: int, expert_ids: npt.NDArray[np.int32], *, caller_gated: bool, retried: int
    ) -> None:
        """Counts one answer; ids of -1 are none."""
        self.version += 1
        self.answered_requests += 1
        self.answered_rows += len(expert_ids)
        self.retried_pairs += retried
        table = (self._caller if caller_gated else self._gated).get(layer)
        if table is not None:
            self._repeats[layer] += retried
            if expert_ids.size <= _FEW_PAIRS:
                for expert in expert_ids.ravel().tolist():
                    if expert >= 0:
                        table[expert] += 1
                return
            # Shifted by one, so that -1 falls into a bin of its own.
            table += np.bincount(expert_ids.ravel() + 1, minlength=len(table) + 1)[1:]

    def report(self, report: control_pb2.ReportAssignmentsRequest) -> None:
        """Writes the totals into a report."""
        for index, counts in self._gated.items():
            caller = self._caller[index]
            if counts.any() or caller.any() or self._repeats[index]:
                report.layers.append(
                    router_pb2.LayerLoad(
                        layer=index,
                        counts=counts.tolist(),
                        caller_gated_counts=caller.tolist(),
                        top_k=self._top_k[index],
                        repeated_pairs=self._repeats[index],
                    )
                )
