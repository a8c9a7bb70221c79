"""Grouped SwiGLU experts: the four kernels, one after the other.

    out[r] = sum over k of weights[r, k] * W_down[e] @ (silu(W_gate[e] @ x[r]) * (W_up[e] @ x[r]))

where e is the slot of ids[r, k], and pairs whose expert is not held are left out. R rows, K experts
asked per row, H hidden size, I intermediate size, E experts of the layer, L slots held.
"""

import torch

from expert_service.kernels.triton_down import down
from expert_service.kernels.triton_gate_up import gate_up
from expert_service.kernels.triton_reduce import reduce
from expert_service.kernels.triton_route import route
from expert_service.kernels.triton_tiles import choose_block_m, down_tile, gate_up_tile


def grouped_swiglu_experts(
    hidden_RH: torch.Tensor,
    expert_ids_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    gate_LIH: torch.Tensor,
    up_LIH: torch.Tensor,
    down_LHI: torch.Tensor,
    local_slots_E: torch.Tensor | None = None,
    block_m: int | None = None,
) -> torch.Tensor:
    """out [R, H] in `hidden_RH`'s dtype; zeros for a row of which nothing is held.

    Ids are looked up in `local_slots_E` (see `route`), or are slots where it is None. `block_m` is
    chosen from the number of pairs unless given. Nothing waits for the device.
    """
    num_slots, size, hidden_size = gate_LIH.shape
    if block_m is None:
        num_pairs = expert_ids_RK.numel()
        block_m = choose_block_m(num_pairs, min(num_pairs, num_slots))
    sizes = (block_m, hidden_size, size, hidden_RH.element_size())

    routed = route(expert_ids_RK, num_slots, block_m, local_slots_E)
    h_AI = gate_up(hidden_RH, gate_LIH, up_LIH, routed, gate_up_tile(*sizes))
    y_AH = down(h_AI, down_LHI, weights_RK, routed, down_tile(*sizes))
    return reduce(y_AH, routed.positions)
