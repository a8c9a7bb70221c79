"""One DeepSeek-V2 MoE layer with random weights: transformers' block, and a checkpoint of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int  # shared experts, which become one, as wide as all of them

    @property
    def expert_bytes(self) -> int:
        """Of one routed expert's weights."""
        return 3 * self.hidden * self.intermediate * DTYPE.itemsize


LITE = Shape(hidden=2048, intermediate=1408, experts=64, top_k=6, shared=2)  # DeepSeek-V2-Lite
TINY_EXPERTS = Shape(hidden=2048, intermediate=8, experts=64, top_k=6, shared=0)
QUICK = Shape(hidden=64, intermediate=32, experts=8, top_k=2, shared=1)


@torch.no_grad()
def make_block(shape: Shape, seed: int = 0) -> DeepseekV2Moe:
    """The block as transformers runs it. Weights keep the size of what passes through them."""
    config = DeepseekV2Config(
        vocab_size=128,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        n_shared_experts=shape.shared,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        dtype=DTYPE,
    )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # no shared expert
        block = DeepseekV2Moe(config).to(DTYPE)
    block = block.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        for matrix in parameter if parameter.dim() == 3 else [parameter]:
            if matrix.numel():
                matrix.normal_(std=matrix.shape[-1] ** -0.5, generator=generator)
    return block


def save_block(block: DeepseekV2Moe, folder: Path) -> None:
    """A checkpoint of that one layer, laid out as DeepSeek publishes it."""
    prefix = "model.layers.0.mlp."
    tensors = {prefix + "gate.weight": block.gate.weight.data}
    for expert in range(block.experts.num_experts):
        gate, up = block.experts.gate_up_proj.data[expert].chunk(2)
        parts = {
            "gate_proj": gate,
            "up_proj": up,
            "down_proj": block.experts.down_proj.data[expert],
        }
        for part, weight in parts.items():
            tensors[f"{prefix}experts.{expert}.{part}.weight"] = weight
    if block.config.n_shared_experts:
        for name, weight in block.shared_experts.state_dict().items():
            tensors[f"{prefix}shared_experts.{name}"] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    block.config.save_pretrained(folder)


def make_rows(shape: Shape, tokens: int, seed: int) -> torch.Tensor:
    """Hidden states as a norm leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, shape.hidden, generator=generator).to(DTYPE)
