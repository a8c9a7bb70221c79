"""The first half of SwiGLU experts: gather, both projections and the activation in one pass.

    h[a] = silu(W_gate[e] @ x[r]) * (W_up[e] @ x[r])     r, e: row and slot of sorted position a

R rows, H hidden size, I intermediate size, L slots, K experts asked per row, A sorted positions
(see `triton_route`). Both sums are kept in float32 and rounded once, after the product.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

import torch
import triton
import triton.language as tl

from expert_service.kernels.triton_route import Route
from expert_service.kernels.triton_tiles import Tile


# Numbers that vary between batches are not specialised on: no batch waits for a compilation.
@triton.jit(do_not_specialize=["num_blocks"])
def _gate_up_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    h_ptr,
    pairs_ptr,
    block_slots_ptr,
    block_rows_ptr,
    num_blocks,
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
    GROUP_M: tl.constexpr,
):
    # Blocks of one group run side by side, column by column: those of one slot share its weights.
    COLUMNS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * COLUMNS)
    group_rows = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    inside = tl.program_id(0) % (GROUP_M * COLUMNS)
    block = group * GROUP_M + inside % group_rows
    column = inside // group_rows

    rows = tl.load(block_rows_ptr + block)
    if rows == 0:
        return
    slot = tl.load(block_slots_ptr + block).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    valid = offs_m < rows
    position = block * BLOCK_M + offs_m
    row = tl.where(valid, tl.load(pairs_ptr + position), 0).to(tl.int64) // K

    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_n = tl.minimum(offs_n, I - 1)  # columns past the end are computed, and not stored
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * stride_xr + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    gate_ptrs = gate_ptr + slot * stride_gl + safe_n[None, :] * stride_gi + offs_k[:, None]
    up_ptrs = up_ptr + slot * stride_ul + safe_n[None, :] * stride_ui + offs_k[:, None]

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x = tl.load(x_ptrs + k, mask=valid[:, None], other=0.0)
            gate_w = tl.load(gate_ptrs + k)  # [BLOCK_K, BLOCK_N]
            up_w = tl.load(up_ptrs + k)
        else:
            inner = offs_k < H - k
            x = tl.load(x_ptrs + k, mask=valid[:, None] & inner[None, :], other=0.0)
            gate_w = tl.load(gate_ptrs + k, mask=inner[:, None], other=0.0)
            up_w = tl.load(up_ptrs + k, mask=inner[:, None], other=0.0)
        gate = tl.dot(x, gate_w, gate, input_precision="ieee")
        up = tl.dot(x, up_w, up, input_precision="ieee")

    h = gate * tl.sigmoid(gate) * up
    h_ptrs = h_ptr + position.to(tl.int64)[:, None] * I + offs_n[None, :]
    mask = valid[:, None] & (offs_n < I)[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)


def gate_up(
    hidden_RH: torch.Tensor,
    gate_LIH: torch.Tensor,
    up_LIH: torch.Tensor,
    routed: Route,
    tile: Tile,
) -> torch.Tensor:
    """h [A, I] in `hidden_RH`'s dtype; undefined at positions that are padding.

    The last dimension of each input must be contiguous; all have one dtype.
    """
    _check(hidden_RH, gate_LIH, up_LIH, routed, tile)
    size = gate_LIH.shape[1]
    h_AI = hidden_RH.new_empty(len(routed.pairs), size)
    num_blocks = len(routed.block_rows)
    if h_AI.numel():
        _gate_up_kernel[(num_blocks * triton.cdiv(size, tile.block_n),)](
            hidden_RH,
            gate_LIH,
            up_LIH,
            h_AI,
            routed.pairs,
            routed.block_slots,
            routed.block_rows,
            num_blocks,
            hidden_RH.stride(0),
            *gate_LIH.stride()[:2],
            *up_LIH.stride()[:2],
            H=hidden_RH.shape[1],
            I=size,
            K=routed.positions.shape[1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=tile.group_m,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return h_AI


def _check(
    hidden_RH: torch.Tensor,
    gate_LIH: torch.Tensor,
    up_LIH: torch.Tensor,
    routed: Route,
    tile: Tile,
) -> None:
    shapes = (
        f"hidden {tuple(hidden_RH.shape)}, gate {tuple(gate_LIH.shape)}, "
        f"up {tuple(up_LIH.shape)}, positions {tuple(routed.positions.shape)}"
    )
    fit = (
        hidden_RH.dim() == 2
        and gate_LIH.dim() == 3
        and gate_LIH.shape == up_LIH.shape
        and gate_LIH.shape[2] == hidden_RH.shape[1]
        and routed.positions.shape[0] == hidden_RH.shape[0]
        and routed.num_slots == gate_LIH.shape[0]
    )
    if not fit:
        wanted = f"[R, H], [L={routed.num_slots}, I, H], [L, I, H], [R, K]"
        raise ValueError(f"{shapes}; expected {wanted}")
    for name, tensor in (("hidden", hidden_RH), ("gate", gate_LIH), ("up", up_LIH)):
        if tensor.dtype != hidden_RH.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; expected {hidden_RH.dtype} as of hidden")
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}; expected the last "
                "dimension contiguous"
            )
    if tile.block_m != routed.block_m:
        raise ValueError(f"the tile has block_m {tile.block_m}; routed for {routed.block_m}")
