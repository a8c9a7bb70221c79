"""From the members of a batch to the (row, expert) pairs to be computed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from expertmesh import gating
from expertmesh.codec.messages import ForwardRequest
from expertmesh.model import GateWeights, LayerSpec

_NO_ROWS: npt.NDArray[np.int64] = np.empty(0, np.int64)


class Sample(NamedTuple):
    """A few rows of a batch: what they scored, and where they were sent."""

    scores: torch.Tensor  # [n, E] float32, before any bias
    expert_ids: torch.Tensor  # [n, K] int32


@dataclass(slots=True)
class RoutedBatch:
    """A batch's rows and pairs.

    Columns 0 .. k-1 are routed experts; with a shared expert the last column is that.
    """

    hidden: torch.Tensor  # [T, H]
    expert_ids: npt.NDArray[np.int32]  # [T, K], -1 for none
    weights: npt.NDArray[np.float32]  # [T, K]
    routed_columns: int
    sample: Sample | None = None  # of the rows asked for that were gated here


def route_batch(
    requests: Sequence[ForwardRequest],
    layer: LayerSpec,
    gate: GateWeights | None,
    bias: torch.Tensor | None,
    sampled: npt.NDArray[np.int64] = _NO_ROWS,
) -> RoutedBatch:
    """Merges requests for one layer, in one dtype, and gates those whose caller has not.

    `bias` [E] float32 is the whole serving bias; it selects and never weighs. `sampled` are rows
    of the batch to be sampled.
    """
    states = [request.hidden_states for request in requests]
    hidden = states[0] if len(states) == 1 else torch.cat(states)
    columns = _routed_columns(requests, layer)
    samples: list[Sample] = []
    if gate is not None and all(request.expert_ids is None for request in requests):
        routing = _gate(hidden, layer, gate, bias, sampled, samples)
        ids, weights = routing.expert_ids.numpy(), routing.weights.numpy()
    else:
        shape = (len(hidden), columns)
        ids, weights = _mixed(requests, layer, gate, bias, shape, sampled, samples)
    if layer.has_shared:
        shared_ids, shared_weights = _shared(requests, layer, gate, hidden)
        ids = np.concatenate((ids, shared_ids), 1)
        weights = np.concatenate((weights, shared_weights), 1)
    return RoutedBatch(hidden, ids, weights, columns, _joined(samples))


def _gate(
    hidden: torch.Tensor,
    layer: LayerSpec,
    gate: GateWeights,
    bias: torch.Tensor | None,
    sampled: npt.NDArray[np.int64],
    samples: list[Sample],
) -> gating.Routing:
    """Gates rows, and adds those of them that are `sampled` to `samples`."""
    spec = layer.gate
    assert spec is not None, "a layer with gate weights has a gate"
    logits = gating.logits(hidden, gate, spec)
    routing = gating.select(logits, spec, bias)
    if len(sampled):
        rows = torch.from_numpy(sampled)
        samples.append(Sample(gating.scores(logits[rows], spec), routing.expert_ids[rows]))
    return routing


def _joined(samples: list[Sample]) -> Sample | None:
    if len(samples) < 2:
        return samples[0] if samples else None
    return Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))


def _routed_columns(requests: Sequence[ForwardRequest], layer: LayerSpec) -> int:
    return max(
        layer.top_k if request.expert_ids is None else request.expert_ids.shape[1]
        for request in requests
    )


def _mixed(
    requests: Sequence[ForwardRequest],
    layer: LayerSpec,
    gate: GateWeights | None,
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    sampled: npt.NDArray[np.int64],
    samples: list[Sample],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and weights of requests that differ in who gates or in k; short rows end in -1."""
    ids = np.full(shape, -1, np.int32)
    weights = np.zeros(shape, np.float32)
    start = 0
    for request in requests:
        stop = start + len(request.hidden_states)
        if request.expert_ids is not None and request.expert_weights is not None:
            k = request.expert_ids.shape[1]
            ids[start:stop, :k] = request.expert_ids.numpy()
            weights[start:stop, :k] = request.expert_weights.numpy()
        elif gate is not None and layer.gate is not None:
            own = sampled[(sampled >= start) & (sampled < stop)] - start
            routing = _gate(request.hidden_states, layer, gate, bias, own, samples)
            ids[start:stop, : layer.top_k] = routing.expert_ids.numpy()
            weights[start:stop, : layer.top_k] = routing.weights.numpy()
        start = stop
    return ids, weights


def _shared(
    requests: Sequence[ForwardRequest],
    layer: LayerSpec,
    gate: GateWeights | None,
    hidden: torch.Tensor,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The shared expert's column: every row, but those whose caller wants routed experts only."""
    rows = len(hidden)
    ids = np.full((rows, 1), layer.shared_id, np.int32)
    weights = np.ones((rows, 1), np.float32)
    gated = gating.shared_weights(hidden, gate) if gate is not None else None
    if gated is not None:
        weights[:, 0] = gated.numpy()
    start = 0
    for request in requests:
        stop = start + len(request.hidden_states)
        if request.expert_ids is not None and not request.include_shared:
            ids[start:stop] = -1
        start = stop
    return ids, weights
