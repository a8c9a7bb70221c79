"""Adds up the weighted outputs of each row's experts.

    out[r] = sum over k of y[positions[r, k]], leaving out pairs that are not held

R rows, H hidden size, K experts asked per row, A sorted positions (see `triton_route`). The sum is
float32, in the order of k, rounded once: it depends on nothing but the row's own pairs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

import torch
import triton
import triton.language as tl

from expert_service.kernels.triton.tables.tiles import next_power_of_2

_BLOCK_H = 1024  # columns of one program: 16 bytes for each thread of four warps


@triton.jit
def _reduce_kernel(
    y_ptr,
    positions_ptr,
    out_ptr,
    stride_ya,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = offs < H
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        position = tl.load(positions_ptr + row * K + k).to(tl.int64)
        end = tl.where(position >= 0, H, 0)  # the interpreter of 3.9 refuses block & scalar masks
        y = tl.load(y_ptr + position * stride_ya + offs, mask=offs < end, other=0.0)
        total += y.to(tl.float32)
    tl.store(out_ptr + row * H + offs, total.to(out_ptr.dtype.element_ty), mask=inside)


def reduce(
    y_AH: torch.Tensor, positions_RK: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """out [R, H] in `dtype`, else in `y_AH`'s; zeros for a row of which nothing is held."""
    _check(y_AH, positions_RK)
    (R, K), H = positions_RK.shape, y_AH.shape[1]
    out_RH = y_AH.new_empty(R, H, dtype=dtype or y_AH.dtype)
    if out_RH.numel():
        block_h = min(_BLOCK_H, next_power_of_2(H))
        _reduce_kernel[(R, triton.cdiv(H, block_h))](
            y_AH, positions_RK, out_RH, y_AH.stride(0), H=H, K=K, BLOCK_H=block_h
        )
    return out_RH


def _check(y_AH: torch.Tensor, positions_RK: torch.Tensor) -> None:
    if y_AH.dim() != 2 or positions_RK.dim() != 2:
        raise ValueError(
            f"y {tuple(y_AH.shape)}, positions {tuple(positions_RK.shape)}; expected [A, H], [R, K]"
        )
    if y_AH.numel() and y_AH.stride(1) != 1:
        raise ValueError(f"y has strides {y_AH.stride()}; expected the last dimension contiguous")
    if positions_RK.dtype != torch.int32 or not positions_RK.is_contiguous():
        raise ValueError(
            f"positions are {positions_RK.dtype} with strides {positions_RK.stride()}; expected "
            "contiguous int32"
        )
