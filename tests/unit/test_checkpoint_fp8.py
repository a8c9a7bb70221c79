"""FP8 blocks: dequantised, or as they are stored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expertmesh.checkpoint import Checkpoint
from expertmesh.checkpoint.fp8 import Block, dequantize, is_finite
from expertmesh.errors import CheckpointError
from expertmesh.model import Slot
from tests.checkpoints import (
    dequantize_slowly,
    edit_config,
    edit_tensors,
    make_checkpoint,
    make_fp8_checkpoint,
    quantize_blocks,
)


def test_every_float8_code_keeps_its_value_nan_included() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)

    found = dequantize(codes, torch.ones(1, 1), Block(128, 128), torch.float32)

    torch.testing.assert_close(found, codes.float(), rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 2
    assert math.copysign(1.0, found[1, 0].item()) == -1.0  # minus zero


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 260)], ids=str)
def test_each_block_is_multiplied_by_its_own_scale(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantized, scale_inv = quantize_blocks(weight)

    found = dequantize(quantized, scale_inv, Block(128, 128), torch.float32)

    assert torch.equal(found, dequantize_slowly(quantized, scale_inv))
    torch.testing.assert_close(found, weight, rtol=0.07, atol=0.01)


def test_blocks_need_not_be_square() -> None:
    quantized = torch.ones(3, 5).to(torch.float8_e4m3fn)
    scale_inv = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    found = dequantize(quantized, scale_inv, Block(2, 3), torch.bfloat16)

    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    path = tmp_path_factory.mktemp("fp8")
    make_fp8_checkpoint(path)
    with Checkpoint.open(path) as opened:
        yield opened


@pytest.mark.parametrize("slot", [Slot(0, 0), Slot(1, 3), Slot(1, 8)], ids=str)
def test_an_expert_can_be_read_as_it_is_stored(checkpoint: Checkpoint, slot: Slot) -> None:
    kept = checkpoint.read_fp8_expert(slot)
    read = checkpoint.read_expert(slot, torch.float32)

    assert checkpoint.is_fp8(slot)
    for matrix, scale, expected in zip(kept[:3], kept[3:], read, strict=True):
        assert matrix.dtype == torch.float8_e4m3fn
        assert scale.dtype == torch.float32
        assert torch.equal(dequantize_slowly(matrix, scale), expected)


def test_other_checkpoints_have_no_fp8_experts(tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path)

    with Checkpoint.open(tmp_path) as checkpoint:
        assert not checkpoint.is_fp8(Slot(0, 0))
        with pytest.raises(CheckpointError, match="is not FP8 in blocks of 128 x 128"):
            checkpoint.read_fp8_expert(Slot(0, 0))


def test_fp8_in_other_blocks_is_only_read_dequantised(tmp_path: Path) -> None:
    make_fp8_checkpoint(tmp_path)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path, quantization_config={**quantization, "weight_block_size": [256, 256]})
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {name: scale for name, scale in tensors.items() if name.endswith("_scale_inv")}
    edit_tensors(tmp_path, **{name: scale[::2, ::2].clone() for name, scale in scales.items()})

    with Checkpoint.open(tmp_path) as checkpoint:
        assert not checkpoint.is_fp8(Slot(1, 3))
        assert checkpoint.read_expert(Slot(1, 3)).gate.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("code", "scale", "dtype", "finite"),
    [
        (0x7E, 1.0, torch.float16, True),  # 448
        (0x7F, 1.0, torch.float32, False),  # NaN
        (0xFF, 1.0, torch.float32, False),  # the other NaN
        (0x00, math.inf, torch.float32, False),
        (0x00, math.nan, torch.float32, False),
        (0x7E, 200.0, torch.float16, False),  # 89600: more than float16 holds
        (0x38, 200.0, torch.float16, True),  # 1: no weight uses up the scale
        (0x7E, 200.0, torch.bfloat16, True),
    ],
)
def test_what_is_not_finite_is_found(
    code: int, scale: float, dtype: torch.dtype, finite: bool
) -> None:
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    codes[1, 2] = code
    scales = torch.full((1, 1), scale)

    assert is_finite(codes.view(torch.float8_e4m3fn), scales, Block(128, 128), dtype) == finite


def test_a_weight_that_is_nan_is_refused_by_name(tmp_path: Path) -> None:
    make_fp8_checkpoint(tmp_path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    codes = torch.zeros(144, 192, dtype=torch.uint8)
    codes[5, 6] = 0x7F
    edit_tensors(tmp_path, **{name: codes.view(torch.float8_e4m3fn)})

    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=f"{name} holds NaN"),
    ):
        checkpoint.read_fp8_expert(Slot(1, 3))
