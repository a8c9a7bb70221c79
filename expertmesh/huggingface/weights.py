"""Are the weights that attaching drops those of the cluster's checkpoint? A few are compared.

Only where the model's own folder is at hand and is, by its digest, what the cluster serves: merged
adapters and weights that were trained since loading are found then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expertmesh.checkpoint import Checkpoint, fp8
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.huggingface.modules import PLACEHOLDERS
from expertmesh.info import MeshInfo
from expertmesh.model import LayerSpec, Slot

_SPAN = 64  # weights of a matrix that are compared, side by side in its middle
_EXPERTS = 4  # of a layer: an adapter, or training, is on all of them
_SHARED = ("shared_experts", "shared_expert")
_NETWORK = ("gate_proj", "up_proj", "down_proj")


def check_weights(
    config: Any, info: MeshInfo, decoder: Sequence[Any], name: str, keeps_gates: bool
) -> None:
    """Refuses a model whose feed-forward weights are not those it was loaded from.

    `decoder` are the decoder layers, called `name`.0 and so on. Gates are compared too, unless the
    model keeps them.
    """
    folder = Path(str(config.name_or_path))
    if not (folder / "config.json").is_file():
        return
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:  # the cluster serves something else
        return
    with checkpoint:
        if checkpoint.digest != info.checkpoint_digest:
            return
        for layer, module in zip(checkpoint.spec.layers, decoder, strict=True):
            for part in _changed(module.mlp, checkpoint, layer, keeps_gates):
                raise ConfigError(
                    f"{name}.{layer.index}.mlp{part} has other weights in the model than in "
                    f"{folder}, which the cluster serves: it was trained, or an adapter merged, "
                    "since it was loaded. Save the model and serve that"
                )


def _changed(
    block: Any, checkpoint: Checkpoint, layer: LayerSpec, keeps_gates: bool
) -> Iterator[str]:
    """Parts of a block whose weights are not the checkpoint's."""
    for part, slot in _parts(block, layer):
        for index, matrix in enumerate(_matrices(block, part, slot)):
            if matrix.is_meta:  # accelerate keeps it elsewhere
                continue
            if checkpoint.is_fp8(slot) and any(
                size % fp8.KERNEL_BLOCK.rows for size in matrix.shape
            ):
                continue  # transformers does not read partial blocks rightly
            start, expected = checkpoint.sample(slot, index, _SPAN)
            if not _is_same(matrix.detach().flatten()[start : start + len(expected)], expected):
                yield part
    if layer.gate is None or keeps_gates or isinstance(block, PLACEHOLDERS):
        return
    stored = checkpoint.read_gate(layer.index, torch.float32)
    held = (
        ("gate", "weight", stored.weight),
        ("gate", "e_score_correction_bias", stored.bias),
        ("shared_expert_gate", "weight", stored.shared_gate),
    )
    for part, name, expected_whole in held:
        whole = getattr(getattr(block, part, None), name, None)
        if whole is None or expected_whole is None or whole.is_meta:
            continue
        if not _is_same(whole.detach(), expected_whole):
            yield f".{part}"


def _parts(block: nn.Module, layer: LayerSpec) -> Iterator[tuple[str, Slot]]:
    """Networks of a block that still have their weights, as attribute and slot."""
    if isinstance(block, PLACEHOLDERS):
        return
    if layer.kind == "dense":
        yield "", Slot(layer.index, layer.shared_id)
        return
    if hasattr(getattr(block, "experts", None), "gate_up_proj"):
        for step in range(min(_EXPERTS, layer.num_experts)):
            expert = step * (layer.num_experts - 1) // max(1, min(_EXPERTS, layer.num_experts) - 1)
            yield ".experts", Slot(layer.index, expert)
    for shared in _SHARED:
        if hasattr(getattr(block, shared, None), "gate_proj"):
            yield f".{shared}", Slot(layer.index, layer.shared_id)


def _matrices(block: Any, part: str, slot: Slot) -> tuple[torch.Tensor, ...]:
    """Gate, up and down of one network as the model holds them."""
    if part == ".experts":
        gate, up = block.experts.gate_up_proj[slot.expert].chunk(2)
        return gate, up, block.experts.down_proj[slot.expert]
    network = block.get_submodule(part.removeprefix(".")) if part else block
    return tuple(getattr(network, name).weight for name in _NETWORK)


def _is_same(mine: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit by bit in one half precision; else up to bfloat16, by which either may have gone."""
    mine = mine.cpu()
    if mine.dtype == expected.dtype != torch.float32:
        return torch.equal(mine, expected)
    return torch.allclose(mine.float(), expected.float(), rtol=2**-7, atol=1e-6)
