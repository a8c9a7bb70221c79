"""What a served model looks like, as frozen data: layers, sizes and gates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

#: Grows when the protocol changes in a way that older peers cannot follow.
PROTOCOL_VERSION = 1

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["top2_sum", "max"]

#: What an announcement says of an expert server; the load controller adds the last one.
SERVER_STATES = ("loading", "ready", "draining", "failed", "lost")


class Slot(NamedTuple):
    """One physical copy of one layer's expert on one server.

    Experts `0 .. num_experts - 1` are routed; `num_experts` is the shared expert, or the whole of
    a dense layer. A server holds at most one slot of an expert, so (layer, expert) names it there.
    """

    layer: int
    expert: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """How one family of models turns router logits into chosen experts and weights.

    The gate is data: `expertmesh.gating` interprets it, no family has code of its own.
    """

    score: Score  # scores from logits, in float32
    top_k: int
    n_group: int = 1  # experts come in this many equal groups ...
    topk_group: int = 1  # ... of which this many stay; the others are masked with -inf
    group_score: GroupScore = "max"
    renormalize: bool = False  # divide the chosen weights by their sum
    renormalize_eps: float = 0.0  # added to that sum (DeepSeek-V3: 1e-20)
    scale: float = 1.0  # routed_scaling_factor
    logits_float32: bool = False  # compute the logits in float32; else in the model's dtype
    round_weights: bool = False  # round weights through the logits' dtype, as the family does


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One feed-forward layer.

    A dense layer is a layer that is all shared expert: `num_experts` is 0 and
    `shared_intermediate_size` the width of its network.
    """

    index: int
    num_experts: int  # routed; 0 for a dense layer
    intermediate_size: int  # of each routed expert; 0 for a dense layer
    shared_intermediate_size: int  # of the shared expert; 0 for none
    shared_gated: bool = False  # the shared output is multiplied by sigmoid(x . w) (Qwen2-MoE)
    gate: GateSpec | None = None  # None for a dense layer
    activation: str = "silu"  # of every expert of the layer, as transformers names it

    @property
    def kind(self) -> Literal["moe", "dense"]:
        """Whether the layer routes."""
        return "moe" if self.num_experts else "dense"

    @property
    def top_k(self) -> int:
        """Experts chosen for a token; 0 for a dense layer."""
        return self.gate.top_k if self.gate else 0

    @property
    def has_shared(self) -> bool:
        """Whether every token also passes a shared expert."""
        return self.shared_intermediate_size > 0

    @property
    def shared_id(self) -> int:
        """The expert id of the shared expert, or of the whole of a dense layer."""
        return self.num_experts

    def width(self, expert: int) -> int:
        """Intermediate size of one expert of this layer."""
        return self.shared_intermediate_size if expert == self.shared_id else self.intermediate_size

    def slots(self) -> Iterator[Slot]:
        """Every expert of the layer, routed ones first."""
        for expert in range(self.num_experts + self.has_shared):
            yield Slot(self.index, expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The feed-forward half of one model."""

    model_type: str
    hidden_size: int
    dtype: torch.dtype  # in which the checkpoint is meant to run
    layers: tuple[LayerSpec, ...]  # ascending by index

    def layer(self, index: int) -> LayerSpec | None:
        """The layer of that index, or None."""
        return next((layer for layer in self.layers if layer.index == index), None)


class ExpertWeights(NamedTuple):
    """The three matrices of one SwiGLU expert: `down @ (silu(gate @ x) * (up @ x))`."""

    gate: torch.Tensor  # [I, H]
    up: torch.Tensor  # [I, H]
    down: torch.Tensor  # [H, I]


class Fp8ExpertWeights(NamedTuple):
    """One SwiGLU expert as DeepSeek stores it: float8 e4m3, w = q * scale.

    A scale is float32 and belongs to a block of 128 rows and 128 columns, ragged at the edges.
    """

    gate: torch.Tensor  # [I, H]
    up: torch.Tensor  # [I, H]
    down: torch.Tensor  # [H, I]
    gate_scale: torch.Tensor  # [ceil(I / 128), ceil(H / 128)]
    up_scale: torch.Tensor
    down_scale: torch.Tensor  # [ceil(H / 128), ceil(I / 128)]


class GateWeights(NamedTuple):
    """What a router needs of one MoE layer."""

    weight: torch.Tensor  # [E, H], float32 where the logits are, else the dtype the model runs in
    bias: torch.Tensor  # [E] float32: the trained expert bias, zeros where the family has none
    shared_gate: torch.Tensor | None  # [1, H], where `LayerSpec.shared_gated`
