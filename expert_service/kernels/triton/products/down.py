"""The second half of SwiGLU experts: the down projection, times the weight of the pair.

    y[a] = weights[r, k] * (W_down[e] @ h[a])     (r, k), e: pair and slot of sorted position a

R rows, H hidden size, I intermediate size, L slots, K experts asked per row, A sorted positions
(see `triton_route`). The sum and the weight are float32, rounded once; FP8 is as in
`triton_gate_up`. Every position has one writer: no atomics, so equal inputs give equal bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

import torch
import triton
import triton.language as tl

from expert_service.kernels.triton.matrices import SCALE_BLOCK, ExpertMatrices
from expert_service.kernels.triton.products.blocks import place
from expert_service.kernels.triton.products.operands import check_matrix, check_rows, check_tile
from expert_service.kernels.triton.products.quantize import Rows, widened
from expert_service.kernels.triton.products.route import Route
from expert_service.kernels.triton.products.weights import (
    add_product,
    by_row,
    described,
    load_weights,
    no_sum,
    takes_descriptor,
    weights_at,
)
from expert_service.kernels.triton.tables.tiles import Tile


# Numbers that vary between batches are not specialised on: no batch waits for a compilation.
@triton.jit(do_not_specialize=["num_blocks", "group_m"])
def _down_kernel(
    h_ptr,  # or a descriptor, with TMA
    h_scale_ptr,  # None where h is not FP8
    down_ptr,  # or a descriptor, with TMA
    down_scale_ptr,  # None where the weights are not FP8
    weights_ptr,
    y_ptr,
    pairs_ptr,
    block_slots_ptr,
    block_rows_ptr,
    num_blocks,
    group_m,
    stride_ha,
    stride_dl,
    stride_dh,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    COLUMNS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    block, column = place(num_blocks, COLUMNS, group_m)

    rows = tl.load(block_rows_ptr + block)
    if rows == 0:
        return
    slot = tl.load(block_slots_ptr + block)
    offs_m = tl.arange(0, BLOCK_M)
    valid = offs_m < rows
    position = (block * BLOCK_M + offs_m).to(tl.int64)
    pair = tl.load(pairs_ptr + position, mask=valid, other=0)
    weight = tl.load(weights_ptr + pair, mask=valid, other=0.0)

    first_n = column * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    safe_n = tl.minimum(offs_n, H - 1)  # columns past the end are computed, and not stored
    offs_k = tl.arange(0, BLOCK_K)
    wide = slot.to(tl.int64)
    if not TMA:
        h_ptrs = h_ptr + position[:, None] * stride_ha + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    down_at = weights_at(down_ptr, wide, stride_dl, stride_dh, safe_n, offs_k, TMA)
    # A tile lies within one block of scales, both ways.
    ROW_SCALES: tl.constexpr = (I + SCALE_BLOCK - 1) // SCALE_BLOCK
    SLOT_SCALES: tl.constexpr = ROW_SCALES * ((H + SCALE_BLOCK - 1) // SCALE_BLOCK)
    scales = wide * SLOT_SCALES + first_n // SCALE_BLOCK * ROW_SCALES

    y = no_sum(BLOCK_M, BLOCK_N, TRANSPOSED)
    for k in range(0, I, BLOCK_K):
        inner = None if I % BLOCK_K == 0 else offs_k < I - k
        if TMA:  # positions of padding hold anything: their rows are not stored
            h = h_ptr.load([block * BLOCK_M, k])
        else:
            h_mask = valid[:, None] if inner is None else valid[:, None] & inner[None, :]
            h = tl.load(h_ptrs + k, mask=h_mask, other=0.0)
        down_w = load_weights(down_at, slot, first_n, k, inner, BLOCK_N, BLOCK_K, TMA)
        if down_scale_ptr is None:
            y = add_product(y, h, down_w, TRANSPOSED)
        else:
            scale = tl.load(down_scale_ptr + scales + k // SCALE_BLOCK)
            if h_scale_ptr is not None:
                h_scales = h_scale_ptr + position * ROW_SCALES + k // SCALE_BLOCK
                scale = by_row(tl.load(h_scales, mask=valid, other=0.0), TRANSPOSED) * scale
            none = no_sum(BLOCK_M, BLOCK_N, TRANSPOSED)
            y += add_product(none, h, widened(down_w, h), TRANSPOSED) * scale

    if TRANSPOSED:
        y = tl.trans(y)
    y = y * weight[:, None]
    y_ptrs = y_ptr + position[:, None] * H + offs_n[None, :]
    mask = valid[:, None] & (offs_n < H)[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def down(
    h: Rows,
    matrices: ExpertMatrices,
    weights_RK: torch.Tensor,
    routed: Route,
    tile: Tile,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [A, H] in `dtype`; undefined at positions that are padding.

    `weights_RK` is float32; nobody reads the weight of a pair that is not held. The last dimension
    of each input must be contiguous.
    """
    _check(h, matrices, weights_RK, routed, tile)
    h_AI, (_, H, size) = h.values_NC, matrices.down_LHI.shape
    y_AH = torch.empty(len(h_AI), H, dtype=dtype, device=h_AI.device)
    num_blocks = len(routed.block_rows)
    uses_tma = tile.tma and takes_descriptor(matrices.down_LHI) and takes_descriptor(h_AI)
    columns = (1, tile.block_n, tile.block_k)
    if y_AH.numel():
        _down_kernel[(num_blocks * triton.cdiv(H, tile.block_n),)](
            described(h_AI, tile.block_m, tile.block_k) if uses_tma else h_AI,
            h.scale_NB,
            described(matrices.down_LHI, *columns) if uses_tma else matrices.down_LHI,
            matrices.down_scale_LBC,
            weights_RK,
            y_AH,
            routed.pairs,
            routed.block_slots,
            routed.block_rows,
            num_blocks,
            tile.group_m,
            h_AI.stride(0),
            *matrices.down_LHI.stride()[:2],
            H=H,
            I=size,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            TRANSPOSED=tile.transposed,
            TMA=uses_tma,
            SCALE_BLOCK=SCALE_BLOCK,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y_AH


def _check(
    h: Rows, matrices: ExpertMatrices, weights_RK: torch.Tensor, routed: Route, tile: Tile
) -> None:
    h_AI, down_LHI = h.values_NC, matrices.down_LHI
    shapes = (
        f"h {tuple(h_AI.shape)}, down {tuple(down_LHI.shape)}, "
        f"weights {tuple(weights_RK.shape)}, positions {tuple(routed.positions.shape)}"
    )
    fit = (
        h_AI.dim() == 2
        and down_LHI.dim() == 3
        and down_LHI.shape[2] == h_AI.shape[1]
        and down_LHI.shape[0] == routed.num_slots
        and len(h_AI) == len(routed.pairs)
        and weights_RK.shape == routed.positions.shape
    )
    if not fit:
        wanted = f"[A={len(routed.pairs)}, I], [L={routed.num_slots}, H, I], [R, K], [R, K]"
        raise ValueError(f"{shapes}; expected {wanted}")
    if weights_RK.dtype != torch.float32 or not weights_RK.is_contiguous():
        raise ValueError(
            f"weights are {weights_RK.dtype} with strides {weights_RK.stride()}; expected "
            "contiguous float32"
        )
    check_rows("h", h, down_LHI)
    check_matrix("down", down_LHI, matrices.down_scale_LBC, down_LHI.dtype)
    check_tile(tile, routed, down_LHI)
