"""The families of models that can be served: one row of data each.

A row says what the tensors are called on disk and how config.json describes the layers and the
gate. Names and routing follow transformers 5.23 (`models/<family>/`, `conversion_mapping.py`),
defaults its configuration classes; neither is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from expertmesh.checkpoint.config import Config
from expertmesh.checkpoint.family import Family
from expertmesh.model import GateSpec


def _after_first_k(config: Config, index: int) -> bool:
    """DeepSeek: the first layers are dense, then every `moe_layer_freq`-th layer routes."""
    frequency = config.size("moe_layer_freq")
    return index >= config.count("first_k_dense_replace") and index % frequency == 0


def _every_sparse_step(config: Config, index: int) -> bool:
    """Qwen: every `decoder_sparse_step`-th layer routes, except those listed."""
    step = config.size("decoder_sparse_step")
    return index not in config.counts("mlp_only_layers") and (index + 1) % step == 0


def _always(config: Config, index: int) -> bool:
    return True


def _shared_copies(config: Config) -> int:
    """DeepSeek fuses its shared experts into one, as wide as all of them."""
    return config.count("n_shared_experts") * config.size("moe_intermediate_size")


def _own_shared_width(config: Config) -> int:
    return config.count("shared_expert_intermediate_size")


def _no_shared(config: Config) -> int:
    return 0


def _sigmoid_gate(config: Config) -> GateSpec:
    """DeepSeek-V3: `DeepseekV3TopkRouter`, `Glm4MoeTopkRouter`."""
    return GateSpec(
        score="sigmoid",
        top_k=config.size("num_experts_per_tok"),
        n_group=config.size("n_group"),
        topk_group=config.size("topk_group"),
        group_score="top2_sum",
        renormalize=config.flag("norm_topk_prob"),
        renormalize_eps=1e-20,
        scale=config.number("routed_scaling_factor"),
        logits_float32=True,
    )


def _grouped_softmax_gate(config: Config) -> GateSpec:
    """DeepSeek-V2: `DeepseekV2TopkRouter`, which never renormalises, whatever norm_topk_prob."""
    grouped = config.one_of("topk_method", "greedy", "group_limited_greedy") != "greedy"
    return GateSpec(
        score="softmax",
        top_k=config.size("num_experts_per_tok"),
        n_group=config.size("n_group") if grouped else 1,
        topk_group=config.size("topk_group") if grouped else 1,
        group_score="max",
        scale=config.number("routed_scaling_factor"),
        logits_float32=True,
    )


def _softmax_gate(config: Config) -> GateSpec:
    """`Qwen2MoeTopKRouter`, `Qwen3MoeTopKRouter`, `OlmoeTopKRouter`."""
    return GateSpec(
        score="softmax",
        top_k=config.size("num_experts_per_tok"),
        renormalize=config.flag("norm_topk_prob"),
        round_weights=True,
    )


def _mixtral_gate(config: Config) -> GateSpec:
    """`MixtralTopKRouter`: always renormalised, never rounded."""
    top_k = config.size("num_experts_per_tok")
    return GateSpec(score="softmax", top_k=top_k, renormalize=True)


_COMMON: Mapping[str, object] = {"hidden_act": "silu", "mlp_bias": False}


#: DeepSeek-V3's layout, which Kimi-K2 and GLM-4.5 share.
_DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    defaults={
        **_COMMON,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
    },
    num_experts_key="n_routed_experts",
    expects={**_COMMON, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    is_sparse=_after_first_k,
    shared_width=_shared_copies,
    gate_spec=_sigmoid_gate,
    bias="gate.e_score_correction_bias",
)

_QWEN_DEFAULTS: Mapping[str, object] = {
    **_COMMON,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

_ROWS = (
    _DEEPSEEK_V3,
    replace(_DEEPSEEK_V3, model_type="kimi_k2"),
    replace(
        _DEEPSEEK_V3,
        model_type="glm4_moe",
        defaults={
            **_DEEPSEEK_V3.defaults,
            "hidden_size": 4096,
            "num_hidden_layers": 46,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
        },
    ),
    Family(
        model_type="deepseek_v2",
        defaults={
            **_COMMON,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 11008,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
        },
        num_experts_key="n_routed_experts",
        expects={**_COMMON, "scoring_func": "softmax"},
        is_sparse=_after_first_k,
        shared_width=_shared_copies,
        gate_spec=_grouped_softmax_gate,
    ),
    Family(
        model_type="qwen2_moe",
        defaults={
            **_QWEN_DEFAULTS,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
        num_experts_key="num_experts",
        expects=_COMMON,
        is_sparse=_every_sparse_step,
        shared_width=_own_shared_width,
        gate_spec=_softmax_gate,
        shared="shared_expert.{part}.weight",
        shared_gate="shared_expert_gate.weight",
    ),
    Family(
        model_type="qwen3_moe",
        defaults={
            **_QWEN_DEFAULTS,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        num_experts_key="num_experts",
        expects=_COMMON,
        is_sparse=_every_sparse_step,
        shared_width=_no_shared,
        gate_spec=_softmax_gate,
    ),
    Family(
        model_type="olmoe",
        defaults={
            **_COMMON,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "intermediate_size": 2048,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        num_experts_key="num_experts",
        width_key="intermediate_size",
        expects=_COMMON,
        is_sparse=_always,
        shared_width=_no_shared,
        gate_spec=_softmax_gate,
    ),
    Family(
        model_type="mixtral",
        defaults={
            **_COMMON,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        num_experts_key="num_local_experts",
        width_key="intermediate_size",
        expects=_COMMON,
        is_sparse=_always,
        shared_width=_no_shared,
        gate_spec=_mixtral_gate,
        block="model.layers.{layer}.block_sparse_moe.",
        parts=("w1", "w3", "w2"),
    ),
)

#: Every family that can be served, by the `model_type` of its config.json.
FAMILIES: Mapping[str, Family] = MappingProxyType({row.model_type: row for row in _ROWS})
