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
from expertmesh.model import GateSpec, GateWeights, LayerSpec
from router_service.kernels.avx512_gate import Avx512Gate

_Pairs = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # ids [T, K], weights [T, K]
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
    kernel: Avx512Gate | None = None,
) -> RoutedBatch:
    """Merges requests for one layer, in one dtype, and gates those whose caller has not.

    `bias` [E] float32 is the whole serving bias; it selects and never weighs. `sampled` are rows
    of the batch to be sampled. `kernel` is the gate in code of our own, where there is one.
    """
    states = [request.hidden_states for request in requests]
    hidden = states[0] if len(states) == 1 else torch.cat(states)
    columns = _routed_columns(requests, layer)
    gating_here = None
    if gate is not None and layer.gate is not None:
        gating_here = _Gate(gate, layer.gate, bias, kernel)
    if gating_here is not None and all(request.expert_ids is None for request in requests):
        ids, weights = gating_here.route(hidden, sampled)
    else:
        ids, weights = _mixed(requests, layer, gating_here, (hidden.shape[0], columns), sampled)
    if layer.has_shared:
        shared_ids, shared_weights = _shared(requests, layer, gate, hidden)
        ids = np.concatenate((ids, shared_ids), 1)
        weights = np.concatenate((weights, shared_weights), 1)
    sample = gating_here.sample() if gating_here is not None else None
    return RoutedBatch(hidden, ids, weights, columns, sample)


class _Gate:
    """One layer's gate for one batch: routes rows, and keeps samples of them."""

    def __init__(
        self,
        weights: GateWeights,
        spec: GateSpec,
        bias: torch.Tensor | None,
        kernel: Avx512Gate | None,
    ) -> None:
        self._weights = weights
        self._spec = spec
        self._bias = bias
        self._kernel = kernel
        self._samples: list[Sample] = []

    def route(self, hidden: torch.Tensor, sampled: npt.NDArray[np.int64]) -> _Pairs:
        """Expert ids and weights of rows, of which `sampled` are samples."""
        if self._kernel is not None and self._kernel.takes(hidden):
            found, ids, weights = self._kernel.arrays(hidden, self._bias)
            logits = torch.from_numpy(found)
        else:
            logits = gating.logits(hidden, self._weights, self._spec)
            chosen = gating.select(logits, self._spec, self._bias)
            ids, weights = chosen.expert_ids.numpy(), chosen.weights.numpy()
        if len(sampled):
            # Logits stay a tensor: they may be bfloat16, which numpy does not have.
            scores = gating.scores(logits[torch.from_numpy(sampled)], self._spec)
            self._samples.append(Sample(scores, torch.from_numpy(ids[sampled])))
        return ids, weights

    def sample(self) -> Sample | None:
        """All samples so far."""
        if len(self._samples) < 2:
            return self._samples[0] if self._samples else None
        return Sample(*(torch.cat(parts) for parts in zip(*self._samples, strict=True)))


def _routed_columns(requests: Sequence[ForwardRequest], layer: LayerSpec) -> int:
    return max(
        layer.top_k if request.expert_ids is None else request.expert_ids.shape[1]
        for request in requests
    )


def _mixed(
    requests: Sequence[ForwardRequest],
    layer: LayerSpec,
    gate: _Gate | None,
    shape: tuple[int, int],
    sampled: npt.NDArray[np.int64],
) -> _Pairs:
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
        elif gate is not None:
            own = sampled[(sampled >= start) & (sampled < stop)] - start
            routed = gate.route(request.hidden_states, own)
            ids[start:stop, : layer.top_k], weights[start:stop, : layer.top_k] = routed
        start = stop
    return ids, weights


def _shared(
    requests: Sequence[ForwardRequest],
    layer: LayerSpec,
    gate: GateWeights | None,
    hidden: torch.Tensor,
) -> _Pairs:
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
