"""DeepSeek's FP8 weights: one scale per block, w = q * scale_inv (a factor, despite its name).

Follows `weight_dequant` of DeepSeek-V3's inference/kernel.py: blocks of 128 x 128 (or what
quantization_config.weight_block_size says), the last of a row or column partial.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from expertmesh.checkpoint.config import Config
from expertmesh.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"
_LARGEST = 448.0  # of float8 e4m3


class Block(NamedTuple):
    """Rows and columns that share one scale."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the scales of a matrix: partial blocks count."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


#: What kernels that compute from FP8 weights take as it is.
KERNEL_BLOCK = Block(128, 128)


def read_block(config: Config) -> Block | None:
    """The block of config.json's quantization_config; None where the model is not quantised.

    Raises CheckpointError for any other scheme.
    """
    values = config.get("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise CheckpointError(f"{config.path}: quantization_config is {values!r}")
    scheme = Config(config.path, values, {"fmt": "e4m3"})
    scheme.one_of("quant_method", "fp8")
    scheme.one_of("fmt", "e4m3")
    sizes = scheme.counts("weight_block_size")
    if len(sizes) != 2 or not all(sizes):
        raise CheckpointError(
            f"{config.path}: weight_block_size is {sizes!r}, expected two sizes of at least 1"
        )
    return Block(*sizes)


def dequantize(
    weight: torch.Tensor, scale_inv: torch.Tensor, block: Block, dtype: torch.dtype
) -> torch.Tensor:
    """A float8 matrix [N, M] with scales [ceil(N / rows), ceil(M / columns)], in `dtype`.

    Multiplies in float32 and rounds once; one row of blocks at a time, so that no float32 copy of
    the whole matrix exists.
    """
    result = torch.empty(weight.shape, dtype=dtype, device="cpu")
    factors = scale_inv.float().mul(256).repeat_interleave(block.columns, dim=1)
    factors = factors[:, : weight.shape[1]]
    for index, start in enumerate(range(0, weight.shape[0], block.rows)):
        rows = slice(start, start + block.rows)
        result[rows] = _halves(weight[rows]).float() * factors[index]
    return result


def is_finite(weight: torch.Tensor, scale: torch.Tensor, block: Block, dtype: torch.dtype) -> bool:
    """Whether a float8 matrix and its float32 scales are finite, and stay so in `dtype`."""
    has_nan = bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any())
    largest = _LARGEST * torch.aminmax(scale.abs()).max  # NaN where a scale is
    if has_nan or not largest.isfinite():
        return False
    if largest <= torch.finfo(dtype).max:
        return True
    # The largest scale need not belong to the largest weight.
    return all(edge.isfinite() for edge in torch.aminmax(dequantize(weight, scale, block, dtype)))


def _halves(weight: torch.Tensor) -> torch.Tensor:
    """Float8 e4m3 divided by 256, exact, as float16.

    Sign, exponent and mantissa of e4m3 are moved to where float16 has them; the exponent biases
    differ by 8. Torch's own conversion takes four times as long on a CPU, and a large checkpoint
    is tens of thousands of matrices.
    """
    codes = weight.view(torch.int8).to(torch.int16)  # the sign now fills the upper byte
    halves = ((codes << 7) & ~0x4000).view(torch.float16)
    # The two codes of NaN land on the next number after the largest, 448 / 256.
    if max(edge.abs() for edge in torch.aminmax(halves)) > 1.75:
        halves.masked_fill_(halves.abs() > 1.75, torch.nan)
    return halves
