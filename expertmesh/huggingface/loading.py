"""Loading a model without its feed-forward layers: their bytes are never read."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.huggingface.attachment import install, open_attachment
from expertmesh.huggingface.dequantised import is_fp8, read_weights
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
# Settings of the loading, although a configuration has keys of the same names.
_LOADING_KEYS = (
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "torch_dtype",
)
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
    kwargs = dict(from_pretrained_kwargs)
    if kwargs.get("output_loading_info"):
        raise ConfigError("output_loading_info is True: load_without_experts returns the model")
    if (Path(path) / "adapter_config.json").exists():
        raise ConfigError(
            f"{path} holds an adapter, of which the cluster would compute nothing: merge it into "
            "its model, save that, and serve it"
        )
    config = _read_config(path, kwargs)
    dequantises = is_fp8(config) and "quantization_config" not in kwargs
    if gate == "model" and getattr(config, "quantization_config", None) and not dequantises:
        # Its quantizer builds experts of its own in place of ours, and reads them.
        raise ConfigError(
            "gate='model' cannot leave out the experts of a checkpoint with this "
            "quantization_config: use gate='cluster', or load the model and attach it"
        )
    attachment = open_attachment(config, address, gate, timeout, wire_dtype)
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with BUILDING, _feed_forward_left_out(model_class, gate):
            if dequantises:
                model, info = _load_dequantised(model_class, path, config, gate, kwargs)
            else:
                model, info = _load(model_class, path, config, kwargs)
        _check_complete(path, info)
        install(model, attachment)
    except BaseException:
        attachment.close()
        raise
    return model


def _load(
    model_class: type[PreTrainedModel],
    path: str | Path | None,
    config: PretrainedConfig,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model as transformers reads it, and what it says of the reading."""
    loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
        path, config=config, output_loading_info=True, **kwargs
    )
    return loaded


def _load_dequantised(
    model_class: type[PreTrainedModel],
    path: str | Path,
    config: PretrainedConfig,
    gate: str,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same for an FP8 checkpoint, whose weights are dequantised here, exactly."""
    where = {key: kwargs[key] for key in _HUB_KEYS if key in kwargs}
    others = {key: value for key, value in kwargs.items() if key not in _HUB_KEYS}
    dtype = _run_dtype(config, others)
    weights = read_weights(path, config, where, _FEED_FORWARD_KEYS, gate == "model", dtype)
    plain = copy.deepcopy(config)
    del plain.quantization_config
    model, info = _load(model_class, None, plain, {**others, "state_dict": weights, "dtype": dtype})
    model.config.name_or_path = str(path)
    with suppress(OSError):  # there is none: the configuration says how to generate
        model.generation_config = GenerationConfig.from_pretrained(path, **where)
    return model, info


def _run_dtype(config: PretrainedConfig, kwargs: dict[str, Any]) -> torch.dtype:
    """The dtype asked for, else the configuration's, else bfloat16."""
    asked = kwargs.pop("torch_dtype", None)
    asked = kwargs.pop("dtype", asked)
    for dtype in (asked, getattr(config, "dtype", None)):
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return torch.bfloat16


def _check_complete(path: str | Path, info: Mapping[str, Any]) -> None:
    """Refuses a model some of whose weights were not there: transformers draws them at random."""
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{path}: {missing[0]} and {len(missing) - 1} more weights of the model are missing"
            if len(missing) > 1
            else f"{path}: {missing[0]} is missing"
        )


def _read_config(path: str | Path, kwargs: dict[str, Any]) -> PretrainedConfig:
    """The configuration given or at `path`, of the class that transformers has for its family.

    Takes out of `kwargs` what belongs to it, as `from_pretrained` does.
    """
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
    kept = {key: kwargs.pop(key) for key in _LOADING_KEYS if key in kwargs}
    config, unused = CONFIG_MAPPING[model_type].from_dict(
        {**values, "model_type": model_type}, return_unused_kwargs=True, **kwargs
    )
    kwargs.clear()
    kwargs.update(unused, **kept)
    return config


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
