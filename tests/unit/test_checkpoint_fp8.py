"""Dequantisation of FP8 blocks."""

from __future__ import annotations

import math

import pytest
import torch

from expertmesh.checkpoint.fp8 import Block, dequantize
from tests.checkpoints import dequantize_slowly, quantize_blocks


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
