"""Tiny random checkpoints of every served family, made and saved by transformers itself.

    model = make_checkpoint("qwen2_moe", tmp_path)      # the model is the reference to compare with

Weights have a standard deviation of 0.1 and trained biases too, negative ones included: large
enough that outputs are not all alike and that the bias changes who is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "kimi_k2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)

_COMMON: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_DEEPSEEK: Mapping[str, Any] = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {
        **_DEEPSEEK,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
    },
    "deepseek_v3": {**_DEEPSEEK, "n_shared_experts": 1},
    "kimi_k2": {**_DEEPSEEK, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "glm4_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "head_dim": 16,
    },
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "olmoe": {"intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4},
    "mixtral": {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def make_checkpoint(
    family: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **config_overrides: Any,
) -> PreTrainedModel:
    """Saves a tiny random model of `family` to the folder `path`, and returns it in eval mode."""
    model = build_model(family, dtype=dtype, seed=seed, **config_overrides)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if family == "kimi_k2":  # unknown to transformers, the same on disk
        edit_config(path, model_type=family, architectures=["DeepseekV3ForCausalLM"])
    return model


def build_model(
    family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config_overrides: Any
) -> PreTrainedModel:
    """The model that `make_checkpoint` saves, in eval mode."""
    config = build_config(family, **config_overrides)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomize(model, seed)
    return model.eval()


def build_config(family: str, **config_overrides: Any) -> PretrainedConfig:
    """The configuration of a tiny model of `family`."""
    model_type = "deepseek_v3" if family == "kimi_k2" else family
    values = {**_COMMON, **_CONFIGS[family], **config_overrides}
    config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    return config


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Every parameter, and every trained expert bias, from a normal distribution: norms around 1,
    the rest around 0. Drawn in float32, so that the dtype does not change the model."""
    generator = torch.Generator().manual_seed(seed)
    biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    for name, tensor in [*model.named_parameters(), *biases]:
        centre = 1.0 if "norm" in name else 0.0
        drawn = torch.randn(tensor.shape, generator=generator) * 0.1 + centre
        tensor.copy_(drawn.to(tensor.dtype))


def edit_config(path: Path, **changes: Any) -> None:
    """Rewrites keys of a saved config.json."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Rewrites tensors of a saved single-file checkpoint; None removes one."""
    file = path / "model.safetensors"
    tensors: dict[str, Any] = {**load_file(file), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def make_fp8_checkpoint(
    path: Path, *, seed: int = 0, attention: bool = False, **config_overrides: Any
) -> dict[str, torch.Tensor]:
    """Saves a DeepSeek-V3 as DeepSeek does: FP8 in blocks of 128 x 128, and an MTP layer after the
    last. Sizes are no multiples of 128, so that edge blocks are partial. With `attention` its
    projections are FP8 too, and the rest is bfloat16, as in what DeepSeek released.

    Returns every tensor of the checkpoint, dequantised, in float32, without the MTP layer.
    """
    sizes = {
        "hidden_size": 192,
        "intermediate_size": 320,
        "moe_intermediate_size": 144,
        "n_routed_experts": 8,
    }
    model = make_checkpoint("deepseek_v3", path, seed=seed, **{**sizes, **config_overrides})
    stored: dict[str, torch.Tensor] = {}
    reference: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        projects = "_proj" in name and name.endswith(".weight")
        if projects and (attention or ".mlp." in name):
            quantized, scale_inv = quantize_blocks(tensor)
            stored[name], stored[name + "_scale_inv"] = quantized, scale_inv
            reference[name] = dequantize_slowly(quantized, scale_inv)
        else:
            is_bias = name.endswith("e_score_correction_bias")
            stored[name] = tensor.bfloat16() if attention and not is_bias else tensor
            reference[name] = stored[name].float()
    mtp = f"model.layers.{model.config.num_hidden_layers}.mlp.gate.weight"
    save_file({**stored, mtp: torch.ones(3)}, path / "model.safetensors")
    edit_config(
        path,
        dtype="bfloat16",
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
    )
    return reference


def quantize_blocks(weight: torch.Tensor, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as float8 e4m3 with one factor per block: largest magnitude / 448."""
    rows, columns = weight.shape
    scale_inv = torch.empty(-(-rows // size), -(-columns // size))
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i, row in enumerate(range(0, rows, size)):
        for j, column in enumerate(range(0, columns, size)):
            block = weight[row : row + size, column : column + size]
            scale_inv[i, j] = block.abs().max() / 448
            q = (block / scale_inv[i, j]).to(torch.float8_e4m3fn)
            quantized[row : row + size, column : column + size] = q
    return quantized, scale_inv


def dequantize_slowly(
    quantized: torch.Tensor, scale_inv: torch.Tensor, size: int = 128
) -> torch.Tensor:
    """Float32 from blocks, element by element in effect: row // size, column // size."""
    rows = torch.arange(quantized.shape[0]) // size
    columns = torch.arange(quantized.shape[1]) // size
    return quantized.float() * scale_inv[rows][:, columns]
