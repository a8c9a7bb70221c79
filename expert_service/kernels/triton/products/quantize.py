"""Rounds activations to FP8, with a scale for each row and 128 columns.

    scale[n, b] = max over the columns c of block b of |x[n, c]| / 448
    values[n, c] = e4m3(x[n, c] / scale[n, c // 128])

N rows, C columns, B = ceil(C / 128) blocks. 448 is the largest e4m3 number. A row's values depend
on nothing but the row. Rounding to the nearest, and to even, is done in float32, so that casts are
exact: those of Triton's interpreter lose a carry.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from expert_service.kernels.triton.matrices import FP8, SCALE_BLOCK

#: Values that one program rounds, at four warps.
_BLOCK_VALUES = 4096
_LARGEST = tl.constexpr(448.0)
#: The smallest maximum that a scale is made of, so that a row of zeros has one.
_SMALLEST = tl.constexpr(1e-30)


class Rows(NamedTuple):
    """Activations, and their scales where they are FP8."""

    values_NC: torch.Tensor
    scale_NB: torch.Tensor | None = None  # contiguous float32


@triton.jit
def block_scale(x):
    """The scale of each row of float32 x [rows, columns of one block]."""
    return tl.maximum(tl.max(tl.abs(x), axis=1), _SMALLEST) / _LARGEST


@triton.jit
def round_e4m3(x):
    """The e4m3 number nearest to each float32 x of at most 448, as float32."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two
    # Adding 1.5 * 2^23 steps pushes what is below a step out of the mantissa. A step is an eighth
    # of the power of two, and no smaller than that of 2^-6, the smallest normal number.
    magic = tl.maximum(power, 0.015625) * 1572864.0
    return (x + magic) - magic


@triton.jit
def widened(weights, x):
    """FP8 weights in the dtype of `x`, which is exact. FP8 ones stay where `x` is FP8."""
    if weights.dtype == x.dtype:
        return weights
    # Straight from float16 to bfloat16 would be F2F on sm_90, one for each weight in its slow unit.
    return weights.to(tl.float16).to(tl.float32).to(x.dtype)


# The number of rows varies: no batch waits for a compilation.
@triton.jit(do_not_specialize=["N"])
def _quantize_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    N,
    stride_xn,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < N)[:, None] & (column < C)[None, :]
    row = row.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * stride_xn + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    scale = block_scale(x)
    values = round_e4m3(x / scale[:, None]).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row[:, None] * C + column[None, :], values, mask=mask)
    tl.store(scale_ptr + row * ((C + BLOCK_C - 1) // BLOCK_C) + block, scale, mask=row < N)


def quantize(x_NC: torch.Tensor) -> Rows:
    """FP8 rows, of 16- or 32-bit ones whose last dimension is contiguous."""
    if x_NC.dim() != 2 or (x_NC.numel() and x_NC.stride(1) != 1):
        raise ValueError(
            f"x {tuple(x_NC.shape)} has strides {x_NC.stride()}; expected rows [N, C], each dense"
        )
    (N, C), blocks = x_NC.shape, triton.cdiv(x_NC.shape[1], SCALE_BLOCK)
    values_NC = torch.empty(N, C, dtype=FP8, device=x_NC.device)
    scale_NB = torch.empty(N, blocks, dtype=torch.float32, device=x_NC.device)
    block_n = _BLOCK_VALUES // SCALE_BLOCK
    if values_NC.numel():
        _quantize_kernel[(triton.cdiv(N, block_n), blocks)](
            x_NC, values_NC, scale_NB, N, x_NC.stride(0), C=C, BLOCK_N=block_n, BLOCK_C=SCALE_BLOCK
        )
    return Rows(values_NC, scale_NB)
