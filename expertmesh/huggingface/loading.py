"""Loading a model without its feed-forward layers: their bytes are never read."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.huggingface.attachment import install, open_attachment
from expertmesh.huggingface.matching import check_family, check_gate, transformers_type
from expertmesh.huggingface.modules import BUILDING, Absent

# transformers' classes, by its model type: MoE block, experts, dense and shared network.
_CLASSES: Mapping[str, tuple[str, str, str | None]] = MappingProxyType(
    {
        "deepseek_v2": ("DeepseekV2Moe", "DeepseekV2Experts", "DeepseekV2MLP"),
        "deepseek_v3": ("DeepseekV3MoE", "DeepseekV3Experts", "DeepseekV3MLP"),
        "glm4_moe": ("Glm4MoeMoE", "Glm4MoeExperts", "Glm4MoeMLP"),
        "mixtral": ("MixtralSparseMoeBlock", "MixtralExperts", None),
        "olmoe": ("OlmoeSparseMoeBlock", "OlmoeExperts", "OlmoeMLP"),
        "qwen2_moe": ("Qwen2MoeSparseMoeBlock", "Qwen2MoeExperts", "Qwen2MoeMLP"),
        "qwen3_moe": ("Qwen3MoeSparseMoeBlock", "Qwen3MoeExperts", "Qwen3MoeMLP"),
    }
)
_FEED_FORWARD_KEYS = r"\.(mlp|block_sparse_moe)\."
# Where to look for config.json, if `path` is a name on the hub.
_HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_without_experts(
    path: str | Path,
    address: str,
    gate: Literal["cluster", "model"] = "cluster",
    timeout: float = 30.0,
    wire_dtype: torch.dtype | str | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """The causal language model at `path`, attached to the cluster at `address`.

    As `attach` after `from_pretrained(path, **from_pretrained_kwargs)`, but the weights of experts
    and dense layers are never read; files that hold nothing else and that the index does not name
    need not be there. `model.expertmesh` is the Attachment; close it when done. While this loads,
    other threads should not build models of the same family: transformers patches classes for the
    whole process.

    Raises what `attach` raises, before anything is loaded, and CheckpointError when there is no
    config.json.
    """
    check_gate(gate)
    if from_pretrained_kwargs.get("output_loading_info"):
        raise ConfigError("output_loading_info is True: load_without_experts returns the model")
    config = _read_config(path, from_pretrained_kwargs)
    if gate == "model" and getattr(config, "quantization_config", None):
        # Its quantizer builds experts of its own in place of ours, and reads them.
        raise ConfigError(
            "gate='model' cannot leave out the experts of a quantised checkpoint: use "
            "gate='cluster', or load the model and attach it"
        )
    attachment = open_attachment(config, address, gate, timeout, wire_dtype)
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with BUILDING, _feed_forward_left_out(model_class, gate):
            model = model_class.from_pretrained(path, config=config, **from_pretrained_kwargs)
        install(model, attachment)
    except BaseException:
        attachment.close()
        raise
    return model


def _read_config(path: str | Path, kwargs: dict[str, Any]) -> PretrainedConfig:
    """The configuration given or at `path`, of the class that transformers has for its family."""
    if given := kwargs.pop("config", None):
        return given
    where = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
    try:
        values, _ = PretrainedConfig.get_config_dict(path, **where)
    except OSError as error:
        raise CheckpointError(f"{path}: config.json cannot be read: {error}") from error
    if not values:
        raise CheckpointError(f"{path}: no config.json is there")
    model_type = transformers_type(check_family(values.get("model_type")))
    return CONFIG_MAPPING[model_type].from_dict({**values, "model_type": model_type})


@contextmanager
def _feed_forward_left_out(model_class: type[PreTrainedModel], gate: str) -> Iterator[None]:
    """Within it, models of the class are built with `Absent` where weights would be."""
    module = importlib.import_module(model_class.__module__)
    block, experts, network = _CLASSES[model_class.config_class.model_type]
    left_out = [block if gate == "cluster" else experts, *([network] if network else [])]
    originals = {name: getattr(module, name) for name in left_out}
    patterns = [f"^{re.escape(name)}$" for name in left_out]  # a bare name also matches within one
    ignored = model_class._keys_to_ignore_on_load_unexpected
    register_patch_mapping(dict.fromkeys(patterns, Absent))
    model_class._keys_to_ignore_on_load_unexpected = [*(ignored or ()), _FEED_FORWARD_KEYS]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = ignored
        unregister_patch_mapping(patterns)
        _restore(originals)


def _restore(originals: Mapping[str, type[nn.Module]]) -> None:
    """Puts classes back: transformers itself does not when building the model has failed."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("transformers."):
            for name, original in originals.items():
                if vars(module).get(name) is Absent:
                    setattr(module, name, original)
