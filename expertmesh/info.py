"""What a cluster says of itself: what it serves, and its load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, Self

import torch

from expertmesh.codec import tensors
from expertmesh.errors import MismatchError
from expertmesh.model import PROTOCOL_VERSION, GateSpec, LayerSpec
from expertmesh.v1 import router_pb2 as pb

_KINDS: Mapping[Literal["moe", "dense"], pb.LayerKind] = {
    "dense": pb.LAYER_KIND_DENSE,
    "moe": pb.LAYER_KIND_MOE,
}
# What GateSettings says, by the name that GateSpec has for it too; top_k is the layer's own.
_GATE_SETTINGS = tuple(each.name for each in fields(GateSpec) if each.name != "top_k")


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One feed-forward layer of the served model: all that its configuration says of it."""

    index: int
    kind: Literal["moe", "dense"]
    num_experts: int  # routed; 0 for a dense layer
    top_k: int  # 0 for a dense layer
    has_shared_expert: bool
    intermediate_size: int = 0  # of each routed expert; 0 for a dense layer
    shared_intermediate_size: int = 0  # of the shared expert, or of a dense layer; 0 for none
    shared_gated: bool = False  # the shared output is multiplied by sigmoid(x . w)
    activation: str = ""  # as transformers names it; "" when a router of an earlier release answers
    gate: GateSpec | None = None  # None for a dense layer, and from a router of an earlier release

    @classmethod
    def of(cls, spec: LayerSpec) -> Self:
        """What a cluster that serves this layer says of it."""
        return cls(
            index=spec.index,
            kind=spec.kind,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            has_shared_expert=spec.has_shared,
            intermediate_size=spec.intermediate_size,
            shared_intermediate_size=spec.shared_intermediate_size,
            shared_gated=spec.shared_gated,
            activation=spec.activation,
            gate=spec.gate,
        )


@dataclass(frozen=True, slots=True)
class MeshInfo:
    """What a cluster serves."""

    model_type: str
    hidden_size: int
    dtype: torch.dtype  # in which the experts compute
    layers: tuple[LayerInfo, ...]
    checkpoint_digest: str
    routers: tuple[str, ...]

    def layer(self, index: int) -> LayerInfo | None:
        """The layer of that index, or None."""
        return next((layer for layer in self.layers if layer.index == index), None)


@dataclass(frozen=True, slots=True)
class MeshLoad:
    """Cumulative load of a cluster, every answer that this client has already included."""

    counts: Mapping[int, torch.Tensor]  # by layer: int64 [E], assignments of either gate
    router_gated: Mapping[int, torch.Tensor]  # by layer: int64 [E], by the router's own gate
    maxvio: Mapping[int, float]  # by layer: (max - mean) / mean
    bias_version: int
    epoch: int
    #: By layer: MaxVio of the controller's last closed window.
    window_maxvio: Mapping[int, float] = field(default_factory=dict)
    #: By layer: share of sampled picks that the trained bias alone would not have made, in the last
    #: closed window.
    divergence: Mapping[int, float] = field(default_factory=dict)
    #: By layer: the largest |serving bias - trained bias|.
    max_abs_delta: Mapping[int, float] = field(default_factory=dict)


def info_of(answer: pb.DescribeResponse, address: str) -> MeshInfo:
    """What a router says that it serves. Raises MismatchError for another protocol version."""
    if answer.protocol_version != PROTOCOL_VERSION:
        raise MismatchError(
            f"router at {address} speaks protocol version {answer.protocol_version}, this client "
            f"{PROTOCOL_VERSION}: install the same release of expertmesh"
        )
    return MeshInfo(
        model_type=answer.model_type,
        hidden_size=answer.hidden_size,
        dtype=tensors.DTYPE_BY_NUMBER[answer.compute_type],
        layers=tuple(layer_of(layer) for layer in answer.layers),
        checkpoint_digest=answer.checkpoint_digest,
        routers=tuple(answer.routers),
    )


def layer_message(layer: LayerInfo) -> pb.Layer:
    """What Describe says of one layer."""
    gate = None
    if layer.gate is not None:
        gate = pb.GateSettings(**{name: getattr(layer.gate, name) for name in _GATE_SETTINGS})
    return pb.Layer(
        index=layer.index,
        kind=_KINDS[layer.kind],
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        has_shared_expert=layer.has_shared_expert,
        intermediate_size=layer.intermediate_size,
        shared_intermediate_size=layer.shared_intermediate_size,
        shared_gated=layer.shared_gated,
        activation=layer.activation,
        gate=gate,
    )


def layer_of(message: pb.Layer) -> LayerInfo:
    """The inverse of `layer_message`."""
    gate = None
    if message.HasField("gate"):
        settings = {name: getattr(message.gate, name) for name in _GATE_SETTINGS}
        gate = GateSpec(top_k=message.top_k, **settings)
    return LayerInfo(
        index=message.index,
        kind="moe" if message.kind == pb.LAYER_KIND_MOE else "dense",
        num_experts=message.num_experts,
        top_k=message.top_k,
        has_shared_expert=message.has_shared_expert,
        intermediate_size=message.intermediate_size,
        shared_intermediate_size=message.shared_intermediate_size,
        shared_gated=message.shared_gated,
        activation=message.activation,
        gate=gate,
    )


def load_of(answer: pb.GetLoadResponse, info: MeshInfo) -> MeshLoad:
    """Every MoE layer is there, with zeros where nothing was counted yet."""
    experts = {layer.index: layer.num_experts for layer in info.layers if layer.num_experts}
    gated = {
        layer: torch.zeros(count, dtype=torch.int64, device="cpu")
        for layer, count in experts.items()
    }
    caller = {layer: counts.clone() for layer, counts in gated.items()}
    for entry in answer.layers:
        if entry.counts:
            gated[entry.layer] = torch.tensor(list(entry.counts), dtype=torch.int64, device="cpu")
        if entry.caller_gated_counts:
            caller[entry.layer] = torch.tensor(
                list(entry.caller_gated_counts), dtype=torch.int64, device="cpu"
            )
    return MeshLoad(
        counts={layer: gated[layer] + caller[layer] for layer in gated},
        router_gated=gated,
        maxvio=dict.fromkeys(gated, 0.0) | {e.layer: e.max_violation for e in answer.layers},
        bias_version=answer.bias_version,
        epoch=answer.epoch,
        window_maxvio={each.layer: each.window_max_violation for each in answer.balance},
        divergence={each.layer: each.divergence for each in answer.balance},
        max_abs_delta={each.layer: each.max_abs_delta for each in answer.balance},
    )
