"""The truth for the Triton kernels: functions of the same names and arguments in slow torch.

Sums are float32 and rounded where the kernels round. What a kernel leaves undefined is -1 or 0.
R rows, K experts asked per row, H hidden size, I intermediate size, L slots, A sorted positions,
N rows and C columns of any activations, B and C blocks of scales of a matrix.
"""

from __future__ import annotations

import torch

from expert_service.kernels.triton.matrices import FP8, SCALE_BLOCK, ExpertMatrices
from expert_service.kernels.triton.products.quantize import Rows
from expert_service.kernels.triton.products.route import Route, max_blocks
from expert_service.kernels.triton.tables.tiles import Tile, Tiles


def route(
    expert_ids_RK: torch.Tensor,
    num_slots: int,
    block_m: int,
    local_slots_E: torch.Tensor | None = None,
) -> Route:
    """See `triton_route.route`."""
    num_blocks = max_blocks(expert_ids_RK.numel(), num_slots, block_m)
    pairs = torch.full((num_blocks, block_m), -1, dtype=torch.int32, device="cpu")
    block_slots = torch.full((num_blocks,), -1, dtype=torch.int32, device="cpu")
    block_rows = torch.zeros(num_blocks, dtype=torch.int32, device="cpu")
    positions = torch.full((expert_ids_RK.numel(),), -1, dtype=torch.int32, device="cpu")
    slots = [_slot(expert, local_slots_E) for expert in expert_ids_RK.flatten().tolist()]

    block = 0
    for slot in range(num_slots):
        mine = [pair for pair, its in enumerate(slots) if its == slot]
        for start in range(0, len(mine), block_m):
            part = mine[start : start + block_m]
            pairs[block, : len(part)] = torch.tensor(part, dtype=torch.int32, device="cpu")
            positions[part] = block * block_m + torch.arange(
                len(part), dtype=torch.int32, device="cpu"
            )
            block_slots[block], block_rows[block] = slot, len(part)
            block += 1
    return Route(
        pairs.flatten(),
        block_slots,
        block_rows,
        torch.tensor([block], dtype=torch.int32, device="cpu"),
        positions.view(expert_ids_RK.shape),
        block_m,
        num_slots,
    )


def route_later(
    expert_ids_RK: torch.Tensor,
    num_slots: int,
    block_m: int,
    local_slots_E: torch.Tensor | None = None,
) -> Route:
    """See `triton_route.route_later`, and what gate_up makes of it."""
    slots = [_slot(expert, local_slots_E) for expert in expert_ids_RK.flatten().tolist()]
    slots = [slot if 0 <= slot < num_slots else -1 for slot in slots]
    pairs = torch.full((len(slots), block_m), -1, dtype=torch.int32, device="cpu")
    pairs[:, 0] = torch.arange(len(slots), device="cpu")
    positions = [pair * block_m if slot >= 0 else -1 for pair, slot in enumerate(slots)]
    return Route(
        pairs.flatten(),
        torch.tensor(slots, dtype=torch.int32, device="cpu"),
        torch.tensor([int(slot >= 0) for slot in slots], dtype=torch.int32, device="cpu"),
        torch.tensor([-1], dtype=torch.int32, device="cpu"),
        torch.tensor(positions, dtype=torch.int32, device="cpu").view(expert_ids_RK.shape),
        block_m,
        num_slots,
    )


def _slot(expert: int, local_slots_E: torch.Tensor | None) -> int:
    if local_slots_E is None:
        return expert
    return int(local_slots_E[expert]) if 0 <= expert < len(local_slots_E) else -1


def _filled(routed: Route) -> list[tuple[int, int, int]]:
    """Sorted position, pair and slot of everything that is held."""
    pairs, slots = routed.pairs.tolist(), routed.block_slots.tolist()
    return [
        (position, pairs[position], slots[position // routed.block_m])
        for position in sorted(routed.positions.flatten().tolist())
        if position >= 0
    ]


def quantize(x_NC: torch.Tensor) -> Rows:
    """See `triton_quantize.quantize`."""
    blocks = x_NC.float().split(SCALE_BLOCK, dim=1)
    scales = [block.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 448 for block in blocks]
    values = [(block / scale).to(FP8) for block, scale in zip(blocks, scales, strict=True)]
    return Rows(torch.cat(values, dim=1), torch.cat(scales, dim=1))


def dequantize(rows: Rows) -> torch.Tensor:
    """float32 values of rows, FP8 or not."""
    values_NC, scale_NB = rows
    if scale_NB is None:
        return values_NC.float()
    return values_NC.float() * _spread(scale_NB, 1, values_NC.shape[1])


def widen(matrix: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """float32 weights [L, rows, columns], of FP8 ones or others."""
    if scale is None:
        return matrix.float()
    return matrix.float() * _spread(_spread(scale, 1, matrix.shape[1]), 2, matrix.shape[2])


def _spread(scale: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return scale.repeat_interleave(SCALE_BLOCK, dim=dim).narrow(dim, 0, size)


def gate_up(x: Rows, matrices: ExpertMatrices, routed: Route, tile: Tile) -> Rows:
    """See `triton_gate_up.gate_up`."""
    x_RH = dequantize(x)
    gate_LIH = widen(matrices.gate_LIH, matrices.gate_scale_LBC)
    up_LIH = widen(matrices.up_LIH, matrices.up_scale_LBC)
    h_AI = torch.zeros(len(routed.pairs), gate_LIH.shape[1], dtype=torch.float32, device="cpu")
    for position, pair, slot in _filled(routed):
        x_H = x_RH[pair // routed.positions.shape[1]]
        h_AI[position] = torch.nn.functional.silu(gate_LIH[slot] @ x_H) * (up_LIH[slot] @ x_H)
    return Rows(h_AI.to(x.values_NC.dtype)) if x.scale_NB is None else quantize(h_AI)


def down(
    h: Rows,
    matrices: ExpertMatrices,
    weights_RK: torch.Tensor,
    routed: Route,
    tile: Tile,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `triton_down.down`."""
    h_AI, down_LHI = dequantize(h), widen(matrices.down_LHI, matrices.down_scale_LBC)
    y_AH = torch.zeros(len(h_AI), down_LHI.shape[1], dtype=dtype, device="cpu")
    for position, pair, slot in _filled(routed):
        y_AH[position] = weights_RK.flatten()[pair] * (down_LHI[slot] @ h_AI[position])
    return y_AH


def reduce(
    y_AH: torch.Tensor, positions_RK: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """See `triton_reduce.reduce`."""
    out_RH = torch.zeros(len(positions_RK), y_AH.shape[1], dtype=torch.float32, device="cpu")
    for row, positions in enumerate(positions_RK.tolist()):
        for position in positions:
            if position >= 0:
                out_RH[row] += y_AH[position].float()
    return out_RH.to(dtype or y_AH.dtype)


def grouped_swiglu_experts(
    hidden_RH: torch.Tensor,
    expert_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    matrices: ExpertMatrices,
    local_slots_E: torch.Tensor | None = None,
    block_m: int | None = None,
    tiles: Tiles | None = None,
    w8a8: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `triton_experts.grouped_swiglu_experts`.

    Nothing is rounded before the end but what `w8a8` rounds to FP8.
    """
    matrices.precision(w8a8)
    gate_LIH, up_LIH, down_LHI = (
        widen(matrix, scale) for matrix, scale in zip(matrices[:3], matrices[3:], strict=True)
    )
    x_RH = dequantize(quantize(hidden_RH)) if w8a8 else hidden_RH.float()
    out_RH = torch.zeros(hidden_RH.shape, dtype=torch.float32, device="cpu")
    for row, experts in enumerate(expert_ids_RK.tolist()):
        for k, expert in enumerate(experts):
            slot = _slot(expert, local_slots_E)
            if 0 <= slot < len(gate_LIH):
                x_H = x_RH[row]
                h_I = torch.nn.functional.silu(gate_LIH[slot] @ x_H) * (up_LIH[slot] @ x_H)
                if w8a8:
                    h_I = dequantize(quantize(h_I[None]))[0]
                out_RH[row] += weights_RK[row, k] * (down_LHI[slot] @ h_I)
    return out_RH.to(out_dtype or hidden_RH.dtype)
