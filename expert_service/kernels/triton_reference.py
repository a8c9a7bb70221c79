"""The truth for the Triton kernels: functions of the same names and arguments in slow torch.

Sums are float32 and rounded where the kernels round. What a kernel leaves undefined is -1 or 0.
R rows, K experts asked per row, H hidden size, I intermediate size, L slots, A sorted positions.
"""

from __future__ import annotations

import torch

from expert_service.kernels.reference import swiglu
from expert_service.kernels.triton_matrices import ExpertMatrices
from expert_service.kernels.triton_route import Route, max_blocks
from expert_service.kernels.triton_tiles import Tile, Tiles
from expertmesh.model import ExpertWeights


def route(
    expert_ids_RK: torch.Tensor,
    num_slots: int,
    block_m: int,
    local_slots_E: torch.Tensor | None = None,
) -> Route:
    """See `triton_route.route`."""
    num_blocks = max_blocks(expert_ids_RK.numel(), num_slots, block_m)
    pairs = torch.full((num_blocks, block_m), -1, dtype=torch.int32)
    block_slots = torch.full((num_blocks,), -1, dtype=torch.int32)
    block_rows = torch.zeros(num_blocks, dtype=torch.int32)
    positions = torch.full((expert_ids_RK.numel(),), -1, dtype=torch.int32)
    slots = [_slot(expert, local_slots_E) for expert in expert_ids_RK.flatten().tolist()]

    block = 0
    for slot in range(num_slots):
        mine = [pair for pair, its in enumerate(slots) if its == slot]
        for start in range(0, len(mine), block_m):
            part = mine[start : start + block_m]
            pairs[block, : len(part)] = torch.tensor(part, dtype=torch.int32)
            positions[part] = block * block_m + torch.arange(len(part), dtype=torch.int32)
            block_slots[block], block_rows[block] = slot, len(part)
            block += 1
    return Route(
        pairs.flatten(),
        block_slots,
        block_rows,
        torch.tensor([block], dtype=torch.int32),
        positions.view(expert_ids_RK.shape),
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


def gate_up(
    hidden_RH: torch.Tensor,
    gate_LIH: torch.Tensor,
    up_LIH: torch.Tensor,
    routed: Route,
    tile: Tile,
) -> torch.Tensor:
    """See `triton_gate_up.gate_up`."""
    h_AI = hidden_RH.new_zeros(len(routed.pairs), gate_LIH.shape[1])
    for position, pair, slot in _filled(routed):
        x_H = hidden_RH[pair // routed.positions.shape[1]].float()
        gate_I = torch.nn.functional.silu(gate_LIH[slot].float() @ x_H)
        h_AI[position] = gate_I * (up_LIH[slot].float() @ x_H)
    return h_AI


def down(
    h_AI: torch.Tensor,
    down_LHI: torch.Tensor,
    weights_RK: torch.Tensor,
    routed: Route,
    tile: Tile,
) -> torch.Tensor:
    """See `triton_down.down`."""
    y_AH = h_AI.new_zeros(len(h_AI), down_LHI.shape[1])
    for position, pair, slot in _filled(routed):
        y_H = down_LHI[slot].float() @ h_AI[position].float()
        y_AH[position] = weights_RK.flatten()[pair] * y_H
    return y_AH


def reduce(y_AH: torch.Tensor, positions_RK: torch.Tensor) -> torch.Tensor:
    """See `triton_reduce.reduce`."""
    out_RH = torch.zeros(len(positions_RK), y_AH.shape[1])
    for row, positions in enumerate(positions_RK.tolist()):
        for position in positions:
            if position >= 0:
                out_RH[row] += y_AH[position].float()
    return out_RH.to(y_AH.dtype)


def grouped_swiglu_experts(
    hidden_RH: torch.Tensor,
    expert_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    matrices: ExpertMatrices,
    local_slots_E: torch.Tensor | None = None,
    block_m: int | None = None,
    tiles: Tiles | None = None,
    w8a8: bool = False,
) -> torch.Tensor:
    """See `triton_experts.grouped_swiglu_experts`; nothing is rounded before the end."""
    out_RH = torch.zeros(hidden_RH.shape)
    for row, experts in enumerate(expert_ids_RK.tolist()):
        for k, expert in enumerate(experts):
            slot = _slot(expert, local_slots_E)
            if 0 <= slot < len(matrices.gate_LIH):
                weights = ExpertWeights(*(matrix[slot] for matrix in matrices[:3]))
                out_RH[row] += weights_RK[row, k] * swiglu(hidden_RH[row : row + 1], weights)[0]
    return out_RH.to(hidden_RH.dtype)
