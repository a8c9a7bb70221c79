"""What both products ask of their operands; each check raises ValueError with names and values."""

from __future__ import annotations

import torch

from expert_service.kernels.triton.matrices import FP8, SCALE_BLOCK, scale_shape
from expert_service.kernels.triton.products.quantize import Rows
from expert_service.kernels.triton.products.route import Route
from expert_service.kernels.triton.tables.tiles import Tile


def check_rows(name: str, rows: Rows, matrix: torch.Tensor) -> None:
    """Rows of the weights' dtype; before FP8 weights, rows of any, FP8 ones with their scales."""
    values = rows.values_NC
    if matrix.dtype != FP8 and values.dtype != matrix.dtype:
        raise ValueError(f"{name} is {values.dtype}; expected {matrix.dtype} as of the weights")
    _check_dense(name, values)
    if (values.dtype == FP8) != (rows.scale_NB is not None):
        raise ValueError(f"{name} is {values.dtype}; scales belong to {FP8}, and only to it")
    if rows.scale_NB is not None:
        blocks = -(-values.shape[1] // SCALE_BLOCK)
        _check_scale(f"{name}_scale", rows.scale_NB, (len(values), blocks))


def check_matrix(
    name: str, matrix: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """A matrix [L, rows, columns] of `dtype`, with its scales where that is FP8."""
    if matrix.dtype != dtype:
        raise ValueError(f"{name} is {matrix.dtype}; expected {dtype} as of the others")
    _check_dense(name, matrix)
    if (dtype == FP8) != (scale is not None):
        raise ValueError(f"{name} is {dtype}; scales belong to {FP8}, and only to it")
    if scale is not None:
        _check_scale(f"{name}_scale", scale, (len(matrix), *scale_shape(*matrix.shape[1:])))


def check_tile(tile: Tile, routed: Route, matrix: torch.Tensor) -> None:
    """A tile of the blocks that pairs were sorted into, and within one block of scales."""
    if tile.block_m != routed.block_m:
        raise ValueError(f"the tile has block_m {tile.block_m}; routed for {routed.block_m}")
    if matrix.dtype == FP8 and max(tile.block_n, tile.block_k) > SCALE_BLOCK:
        raise ValueError(
            f"the tile is {tile.block_n} x {tile.block_k}; expected at most {SCALE_BLOCK} each "
            "way, which share a scale"
        )


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}; expected the last "
            "dimension contiguous"
        )


def _check_scale(name: str, scale: torch.Tensor, shape: tuple[int, ...]) -> None:
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape or not scale.is_contiguous():
        raise ValueError(
            f"{name} is {scale.dtype} {tuple(scale.shape)}; expected contiguous float32 {shape}"
        )
