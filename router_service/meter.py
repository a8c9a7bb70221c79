"""The divergence meter: of what this router served, how much the trained bias would not have.

A few rows of each batch are sampled: their scores before any bias, and the experts that they were
sent to. What they would have chosen under the trained bias alone is worked out when counts are
reported, off the event loop; the scores go with the report, so that the load controller can judge
the next bias on them. All of it is bounded, and none of it happens unless biases move.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from expertmesh import gating
from expertmesh.codec.tensors import NUMBER_BY_DTYPE
from expertmesh.config import RouterConfig
from expertmesh.model import LayerSpec
from expertmesh.v1 import control_pb2, tensor_pb2
from router_service.routing import Sample
from router_service.snapshot import Model

_LEAST_ROWS = 8  # of a layer in one report, however many layers share the bytes
_BATCHES = 4  # over which a report's rows are spread, so that one batch does not speak for all
_PICKS = 1024  # on which a share is measured before it replaces the last one


class DivergenceMeter:
    """Samples of every MoE layer since the last report. Used from one event loop."""

    def __init__(self, model: Model, config: RouterConfig) -> None:
        self._model = model
        self._layers = {layer.index: layer for layer in model.spec.layers if layer.gate}
        row_bytes = 4 * sum(layer.num_experts for layer in self._layers.values())
        affordable = max(_LEAST_ROWS, config.sample_bytes // max(1, row_bytes))
        self._most_rows = min(config.sample_rows, affordable)
        self._random = np.random.default_rng()
        self._samples: dict[int, list[Sample]] = {}
        self._sampled: dict[int, int] = {}  # rows in `_samples`
        # [changed, all] picks: since the start, of the share being measured, of the last one.
        self._totals = {index: np.zeros(2, np.int64) for index in self._layers}
        self._measuring = {index: np.zeros(2, np.int64) for index in self._layers}
        self._measured = {index: np.zeros(2, np.int64) for index in self._layers}

    def rows(self, layer: int, rows: int) -> npt.NDArray[np.int64]:
        """Which rows of a batch to sample; none once the layer has enough for this report."""
        free = self._most_rows - self._sampled.get(layer, 0)
        wanted = min(rows, free, -(-self._most_rows // _BATCHES))
        if wanted <= 0 or layer not in self._layers:
            return np.empty(0, np.int64)
        self._sampled[layer] = self._sampled.get(layer, 0) + wanted
        return (self._random.integers(rows) + np.arange(wanted) * rows // wanted) % rows

    def take(self, layer: int, sample: Sample) -> None:
        """Keeps what was sampled until the next report."""
        self._samples.setdefault(layer, []).append(sample)

    def drain(self) -> dict[int, Sample]:
        """What was sampled since the last time, by layer, and room for more."""
        drained, self._samples, self._sampled = self._samples, {}, {}
        return {
            layer: Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))
            for layer, samples in drained.items()
        }

    def measure(self, samples: dict[int, Sample]) -> list[control_pb2.LayerSample]:
        """Counts changed picks, and writes them with the scores for a report.

        Tensor work, for a worker thread; one call at a time.
        """
        return [self._measure(self._layers[layer], each) for layer, each in samples.items()]

    def _measure(self, layer: LayerSpec, sample: Sample) -> control_pb2.LayerSample:
        gate, spec = self._model.gates[layer.index], layer.gate
        assert spec is not None, "only MoE layers are sampled"
        own = gating.choice_mask(sample.scores, spec, gate.bias)
        changed = gating.changed_picks(sample.expert_ids, own)
        new = np.array([changed, sample.expert_ids.numel()], np.int64)
        total = self._totals[layer.index] + new
        measuring = self._measuring[layer.index] + new
        if measuring[1] >= _PICKS:
            self._measured[layer.index], measuring = measuring, np.zeros(2, np.int64)
        self._totals[layer.index], self._measuring[layer.index] = total, measuring
        return control_pb2.LayerSample(
            layer=layer.index,
            changed_picks=int(total[0]),
            sampled_picks=int(total[1]),
            scores=tensor_pb2.Tensor(
                data_type=NUMBER_BY_DTYPE[torch.float32],  # type: ignore[arg-type]
                shape=sample.scores.shape,
                data=sample.scores.numpy().tobytes(),
            ),
        )

    def share(self) -> float:
        """The divergence of the most diverging layer, lately; 0 where nothing was measured."""
        recent = [m if m[1] else self._measuring[layer] for layer, m in self._measured.items()]
        return max((float(m[0] / m[1]) for m in recent if m[1]), default=0.0)

    def restart(self) -> None:
        """Biases have stopped moving, or start anew: what was measured says nothing any more."""
        self._samples, self._sampled = {}, {}
        for table in (self._measuring, self._measured):
            for index in table:
                table[index] = np.zeros(2, np.int64)
