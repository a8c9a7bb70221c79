"""The first half of SwiGLU experts: gather, both projections and the activation in one pass.

    h[a] = silu(W_gate[e] @ x[r]) * (W_up[e] @ x[r])     r, e: row and slot of sorted position a

R rows, H hidden size, I intermediate size, L slots, K experts asked per row, A sorted positions
(see `triton_route`). Both sums are kept in float32 and rounded once, after the product. FP8 weights
are widened in registers, which is exact, and each block of 128 elements of a sum is multiplied by
its scale in float32. FP8 rows (see `triton_quantize`) give FP8 rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

import torch
import triton
import triton.language as tl

from expert_service.kernels.triton.matrices import SCALE_BLOCK, ExpertMatrices
from expert_service.kernels.triton.products.blocks import place, sort_pair
from expert_service.kernels.triton.products.operands import check_matrix, check_rows, check_tile
from expert_service.kernels.triton.products.quantize import Rows, block_scale, round_e4m3, widened
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
def _gate_up_kernel(
    x_ptr,
    x_scale_ptr,  # None where x is not FP8
    gate_ptr,  # or a descriptor, with TMA
    up_ptr,
    gate_scale_ptr,  # None where the weights are not FP8
    up_scale_ptr,
    h_ptr,
    h_scale_ptr,  # None where x is not FP8
    pairs_ptr,
    block_slots_ptr,
    block_rows_ptr,
    num_blocks,
    group_m,
    positions_ptr,  # None where pairs are sorted
    ids_ptr,
    map_ptr,  # None where ids are slots
    num_experts,
    num_slots,
    stride_xr,
    stride_gl,
    stride_gi,
    stride_ul,
    stride_ui,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    COLUMNS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    block, column = place(num_blocks, COLUMNS, group_m)

    if positions_ptr is None:
        rows = tl.load(block_rows_ptr + block)
        slot = tl.load(block_slots_ptr + block)
    else:
        slot, rows = sort_pair(
            block,
            column,
            pairs_ptr,
            block_slots_ptr,
            block_rows_ptr,
            num_blocks,
            positions_ptr,
            ids_ptr,
            map_ptr,
            num_experts,
            num_slots,
            BLOCK_M,
        )
    if rows == 0:
        return
    offs_m = tl.arange(0, BLOCK_M)
    valid = offs_m < rows
    position = block * BLOCK_M + offs_m
    if positions_ptr is None:
        row = tl.where(valid, tl.load(pairs_ptr + position), 0).to(tl.int64) // K
    else:
        row = (tl.zeros([BLOCK_M], tl.int64) + block) // K

    first_n = column * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    safe_n = tl.minimum(offs_n, I - 1)  # columns past the end are computed, and not stored
    offs_k = tl.arange(0, BLOCK_K)
    wide = slot.to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * stride_xr + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    gate_at = weights_at(gate_ptr, wide, stride_gl, stride_gi, safe_n, offs_k, TMA)
    up_at = weights_at(up_ptr, wide, stride_ul, stride_ui, safe_n, offs_k, TMA)
    # A tile lies within one block of scales, both ways.
    ROW_SCALES: tl.constexpr = (H + SCALE_BLOCK - 1) // SCALE_BLOCK
    SLOT_SCALES: tl.constexpr = ROW_SCALES * ((I + SCALE_BLOCK - 1) // SCALE_BLOCK)
    scales = wide * SLOT_SCALES + first_n // SCALE_BLOCK * ROW_SCALES

    gate = no_sum(BLOCK_M, BLOCK_N, TRANSPOSED)
    up = no_sum(BLOCK_M, BLOCK_N, TRANSPOSED)
    for k in range(0, H, BLOCK_K):
        inner = None if H % BLOCK_K == 0 else offs_k < H - k
        x_mask = valid[:, None] if inner is None else valid[:, None] & inner[None, :]
        x = tl.load(x_ptrs + k, mask=x_mask, other=0.0)
        gate_w = load_weights(gate_at, slot, first_n, k, inner, BLOCK_N, BLOCK_K, TMA)
        up_w = load_weights(up_at, slot, first_n, k, inner, BLOCK_N, BLOCK_K, TMA)
        if gate_scale_ptr is None:
            gate = add_product(gate, x, gate_w, TRANSPOSED)
            up = add_product(up, x, up_w, TRANSPOSED)
        else:
            gate_scale = tl.load(gate_scale_ptr + scales + k // SCALE_BLOCK)
            up_scale = tl.load(up_scale_ptr + scales + k // SCALE_BLOCK)
            if x_scale_ptr is not None:
                x_scales = x_scale_ptr + row * ROW_SCALES + k // SCALE_BLOCK
                x_scale = by_row(tl.load(x_scales, mask=valid, other=0.0), TRANSPOSED)
                gate_scale = x_scale * gate_scale
                up_scale = x_scale * up_scale
            none = no_sum(BLOCK_M, BLOCK_N, TRANSPOSED)
            gate += add_product(none, x, widened(gate_w, x), TRANSPOSED) * gate_scale
            up += add_product(none, x, widened(up_w, x), TRANSPOSED) * up_scale

    h = gate * tl.sigmoid(gate) * up
    if TRANSPOSED:
        h = tl.trans(h)
    position = position.to(tl.int64)
    if h_scale_ptr is not None:
        # Columns past the end repeat the last one: the largest value is not changed by them.
        h_scale = block_scale(h)
        h = round_e4m3(h / h_scale[:, None])
        BLOCKS: tl.constexpr = (I + SCALE_BLOCK - 1) // SCALE_BLOCK
        tl.store(h_scale_ptr + position * BLOCKS + column, h_scale, mask=valid)
    h_ptrs = h_ptr + position[:, None] * I + offs_n[None, :]
    mask = valid[:, None] & (offs_n < I)[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


def gate_up(x: Rows, matrices: ExpertMatrices, routed: Route, tile: Tile) -> Rows:
    """h [A, I] in the dtype of `x`, with scales if it has; undefined at positions of padding.

    The last dimension of each input must be contiguous. A route of `route_later` is filled in. FP8
    rows need a tile of 128 columns, since 128 columns of h share a scale.
    """
    _check(x, matrices, routed, tile)
    _, H, size = matrices.sizes
    h_AI = x.values_NC.new_empty(len(routed.pairs), size)
    h_scale_AB = None
    if x.scale_NB is not None:
        h_scale_AB = x.scale_NB.new_empty(len(h_AI), triton.cdiv(size, SCALE_BLOCK))
    num_blocks = len(routed.block_rows)
    uses_tma = tile.tma and all(map(takes_descriptor, (matrices.gate_LIH, matrices.up_LIH)))
    columns = (1, tile.block_n, tile.block_k)
    if h_AI.numel():
        _gate_up_kernel[(num_blocks * triton.cdiv(size, tile.block_n),)](
            x.values_NC,
            x.scale_NB,
            described(matrices.gate_LIH, *columns) if uses_tma else matrices.gate_LIH,
            described(matrices.up_LIH, *columns) if uses_tma else matrices.up_LIH,
            matrices.gate_scale_LBC,
            matrices.up_scale_LBC,
            h_AI,
            h_scale_AB,
            routed.pairs,
            routed.block_slots,
            routed.block_rows,
            num_blocks,
            tile.group_m,
            *_unsorted(routed),
            x.values_NC.stride(0),
            *matrices.gate_LIH.stride()[:2],
            *matrices.up_LIH.stride()[:2],
            H=H,
            I=size,
            K=routed.positions.shape[1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            TRANSPOSED=tile.transposed,
            TMA=uses_tma,
            SCALE_BLOCK=SCALE_BLOCK,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return Rows(h_AI, h_scale_AB)


def _unsorted(routed: Route) -> tuple[torch.Tensor | int | None, ...]:
    """What the kernel needs to fill a route in, None for each where it is there."""
    if routed.later is None:
        return (None,) * 5
    ids_RK, local_slots_E = routed.later
    num_experts = 0 if local_slots_E is None else len(local_slots_E)
    return routed.positions, ids_RK, local_slots_E, num_experts, routed.num_slots


def _check(x: Rows, matrices: ExpertMatrices, routed: Route, tile: Tile) -> None:
    gate_LIH, up_LIH = matrices.gate_LIH, matrices.up_LIH
    shapes = (
        f"hidden {tuple(x.values_NC.shape)}, gate {tuple(gate_LIH.shape)}, "
        f"up {tuple(up_LIH.shape)}, positions {tuple(routed.positions.shape)}"
    )
    fit = (
        x.values_NC.dim() == 2
        and gate_LIH.dim() == 3
        and gate_LIH.shape == up_LIH.shape
        and gate_LIH.shape[2] == x.values_NC.shape[1]
        and routed.positions.shape[0] == x.values_NC.shape[0]
        and routed.num_slots == gate_LIH.shape[0]
    )
    if not fit:
        wanted = f"[R, H], [L={routed.num_slots}, I, H], [L, I, H], [R, K]"
        raise ValueError(f"{shapes}; expected {wanted}")
    check_rows("hidden", x, gate_LIH)
    check_matrix("gate", gate_LIH, matrices.gate_scale_LBC, gate_LIH.dtype)
    check_matrix("up", up_LIH, matrices.up_scale_LBC, gate_LIH.dtype)
    check_tile(tile, routed, gate_LIH)
    if x.scale_NB is not None and tile.block_n < min(SCALE_BLOCK, gate_LIH.shape[1]):
        raise ValueError(
            f"the tile has block_n {tile.block_n}; expected {SCALE_BLOCK}, which share a scale of h"
        )
