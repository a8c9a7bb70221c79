"""What a batch is answered with: one immutable view of biases and placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from expertmesh.codec.slots import slots_of
from expertmesh.model import GateWeights, LayerSpec, ModelSpec
from expertmesh.placement import SlotMap
from expertmesh.v1 import control_pb2
from router_service.kernels.avx512_gate import Avx512Gate


@dataclass(frozen=True)
class Snapshot:
    """One bias version and one slot map. A batch takes one and uses it to the end."""

    slots: SlotMap
    bias_version: int = 0
    mode: str = "frozen"
    #: By layer: trained bias + serving delta, [E] float32; the trained one for layers not here.
    biases: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def with_placement(self, placement: control_pb2.Placement, spec: ModelSpec) -> Snapshot:
        """The snapshot with that placement, or itself when its epoch is not newer."""
        if placement.epoch <= self.slots.epoch:
            return self
        held = {server.server_id: slots_of(server.layers) for server in placement.servers}
        rates = {server.server_id: server.rate or 1.0 for server in placement.servers}
        return replace(self, slots=SlotMap.of(placement.epoch, spec, held, rates))

    def with_bias(
        self, update: control_pb2.BiasUpdate, gates: Mapping[int, GateWeights]
    ) -> Snapshot:
        """The snapshot with those deltas, or itself when their version is not newer."""
        if update.version <= self.bias_version:
            return self
        biases = {
            entry.layer: gates[entry.layer].bias + _tensor(entry.delta)
            for entry in update.layers
            if entry.layer in gates and len(entry.delta) == len(gates[entry.layer].bias)
        }
        return replace(self, bias_version=update.version, mode=update.mode, biases=biases)


def _tensor(delta: Sequence[float]) -> torch.Tensor:
    """[E] float32, through numpy: torch reads a list several times as slowly, and a large model's
    push is 15,000 numbers."""
    return torch.from_numpy(np.fromiter(delta, np.float32, len(delta)))


@dataclass(frozen=True)
class Model:
    """What a router knows of the model: its shape, its gates, its digest."""

    spec: ModelSpec
    gates: Mapping[int, GateWeights]  # by index of each MoE layer
    digest: str
    dtype: torch.dtype  # in which the servers compute
    #: By index: the gate in code of our own, of layers and CPUs that it is for.
    kernels: Mapping[int, Avx512Gate] = field(default_factory=dict)

    def layer(self, index: int) -> LayerSpec | None:
        """The layer of that index, or None."""
        return self._layers.get(index)

    @cached_property
    def _layers(self) -> dict[int, LayerSpec]:
        """Asked for by every request: `ModelSpec.layer` looks at one layer after the other."""
        return {layer.index: layer for layer in self.spec.layers}


class EpochsInUse:
    """Which placements batches in flight were planned with."""

    def __init__(self) -> None:
        self._batches: dict[int, int] = {}

    def begin(self, epoch: int) -> None:
        """One more batch uses the epoch, until `end`."""
        self._batches[epoch] = self._batches.get(epoch, 0) + 1

    def end(self, epoch: int) -> None:
        """A batch that used the epoch has ended."""
        self._batches[epoch] -= 1
        if not self._batches[epoch]:
            del self._batches[epoch]

    def oldest(self, otherwise: int) -> int:
        """The oldest epoch in use, `otherwise` when none is."""
        return min(self._batches, default=otherwise)
