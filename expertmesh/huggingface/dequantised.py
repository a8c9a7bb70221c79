"""Attention of FP8 checkpoints, dequantised exactly.

transformers divides rows by rows of scales to find the block, which fails where the last block is
partial (DeepSeek-V3's kv_a_proj_with_mqa: 576 rows, 5 scales), or is wrong in silence where the
division has no rest (160 rows, 2 scales). So what stays in the model is read here instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from expertmesh.checkpoint import fp8
from expertmesh.checkpoint.config import Config
from expertmesh.checkpoint.tensor_store import INDEX_FILE, SINGLE_FILE, TensorStore
from expertmesh.errors import CheckpointError, ConfigError

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_GATE = re.compile(r"\.(gate|shared_expert_gate)\.")


def is_fp8(config: PretrainedConfig) -> bool:
    """Whether the checkpoint of this configuration is FP8 in blocks, as DeepSeek stores it."""
    scheme = _scheme(getattr(config, "quantization_config", None))
    return scheme.get("quant_method") == "fp8" and bool(scheme.get("weight_block_size"))


def read_weights(
    path: str | Path,
    config: PretrainedConfig,
    where: Mapping[str, Any],
    feed_forward: str,
    keeps_gates: bool,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Every weight that stays in the model, by its name in the checkpoint, FP8 ones in `dtype`.

    `path` and `where` are a folder, or a name on the hub and where to look for it; `feed_forward`
    matches names of weights that the cluster has. Raises CheckpointError.
    """
    left_out = re.compile(feed_forward)
    weights = {}
    store = _open(path, where)
    try:
        for name in store:
            layer = _LAYER.search(name)
            if layer and int(layer[1]) >= config.num_hidden_layers:  # multi-token prediction
                continue
            if left_out.search(name) and not (keeps_gates and _GATE.search(name)):
                continue
            if not name.endswith(fp8.SCALE_SUFFIX):
                weights[name] = _read(store, name, _block(config), dtype)
    finally:
        store.close()
    return weights


def check_exact(model: PreTrainedModel) -> None:
    """Refuses a model whose attention transformers has dequantised with blocks that are wrong."""
    folder = Path(model.config.name_or_path)
    if not (folder / "config.json").is_file():
        return
    values, _ = PretrainedConfig.get_config_dict(folder)
    config = PretrainedConfig(quantization_config=values.get("quantization_config"))
    if not is_fp8(config):
        return
    block = _block(config)
    store = _open(folder, {})
    try:
        for name, module in model.named_modules():
            weight_name = f"{name}.weight"
            if type(module) is nn.Linear and weight_name in store:
                _check_weight(store, weight_name, module.weight.detach(), block)
    finally:
        store.close()


def _check_weight(store: TensorStore, name: str, weight: torch.Tensor, block: fp8.Block) -> None:
    rows, columns = weight.shape
    is_ragged = rows % block.rows or columns % block.columns
    if not is_ragged or store.info(name).dtype != torch.float8_e4m3fn or weight.is_meta:
        return
    scales = store.info(name + fp8.SCALE_SUFFIX).shape
    if len(scales) != 2 or rows % scales[0] or columns % scales[1]:
        return  # transformers does not load it
    guessed = fp8.Block(rows // scales[0], columns // scales[1])
    taken = weight.cpu()
    wrong = _read(store, name, guessed, taken.dtype)
    exact = _read(store, name, block, taken.dtype)
    if torch.equal(taken, wrong) and not torch.equal(wrong, exact):
        raise ConfigError(
            f"{name} was dequantised in blocks of {guessed.rows} x {guessed.columns}, its scales "
            f"are for {block.rows} x {block.columns}: transformers does not read partial blocks. "
            "Use load_without_experts, which does"
        )


def _open(path: str | Path, where: Mapping[str, Any]) -> TensorStore:
    """The checkpoint's files; on the hub those that hold no weights that stay are fetched too."""
    if (Path(path) / where.get("subfolder", "")).is_dir():
        return TensorStore(Path(path) / where.get("subfolder", ""))
    for name in (SINGLE_FILE, INDEX_FILE):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
        if found:
            return _HubStore(Path(found).parent, path, where)
    raise CheckpointError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


class _HubStore(TensorStore):
    """Files of a repository on the hub, fetched when a tensor in them is asked for."""

    def __init__(self, folder: Path, repository: str | Path, where: Mapping[str, Any]) -> None:
        self._repository, self._where = repository, where
        super().__init__(folder)

    def path_to(self, file_name: str) -> Path:
        """See TensorStore."""
        found = cached_file(self._repository, file_name, **self._where)
        return Path(str(found))


def _read(store: TensorStore, name: str, block: fp8.Block, dtype: torch.dtype) -> torch.Tensor:
    weight = store.read(name)
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    scales = store.read(name + fp8.SCALE_SUFFIX)
    expected = tuple(block.grid((weight.shape[0], weight.shape[1])))
    if scales.shape != expected:
        raise CheckpointError(
            f"{store.path_of(name)}: {name + fp8.SCALE_SUFFIX} has shape {list(scales.shape)}, "
            f"expected {list(expected)}"
        )
    return fp8.dequantize(weight, scales, block, dtype)


def _block(config: PretrainedConfig) -> fp8.Block:
    scheme = _scheme(config.quantization_config)
    block = fp8.read_block(Config(Path("config.json"), {"quantization_config": scheme}))
    assert block is not None, "there is a quantization_config"
    return block


def _scheme(given: object) -> dict[str, Any]:
    """quantization_config as config.json has it; transformers makes an object of it."""
    values = given.to_dict() if hasattr(given, "to_dict") else given
    if not isinstance(values, dict):
        return {}
    method = values.get("quant_method")
    return {**values, "quant_method": getattr(method, "value", method)}
