"""Grouped SwiGLU experts: the four kernels, one after the other.

    out[r] = sum over k of weights[r, k] * W_down[e] @ (silu(W_gate[e] @ x[r]) * (W_up[e] @ x[r]))

where e is the slot of ids[r, k], and pairs whose expert is not held are left out. R rows, K experts
asked per row, H hidden size, I intermediate size, E experts of the layer, L slots held.
"""

import torch

from expert_service.kernels.triton.matrices import ExpertMatrices
from expert_service.kernels.triton.products.down import down
from expert_service.kernels.triton.products.gate_up import gate_up
from expert_service.kernels.triton.products.quantize import Rows, quantize
from expert_service.kernels.triton.products.reduce import reduce
from expert_service.kernels.triton.products.route import route, route_later
from expert_service.kernels.triton.tables.tiles import Tiles, rule_tiles, rule_tiles_for
from expertmesh.dispatch import partial_dtype


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
    """out [R, H] in `out_dtype`, else in `hidden_RH`'s; zeros for a row of which nothing is held.

    Ids are looked up in `local_slots_E` (see `route`), or are slots where it is None. `tiles` are
    the rule's unless given: for `block_m`, or for the number of pairs. With `w8a8`, for FP8 weights
    only, x and h are rounded to FP8 too. Nothing waits for the device.
    """
    precision = matrices.precision(w8a8)
    if tiles is None:
        _, hidden_size, size = matrices.sizes
        if block_m is None:
            tiles = rule_tiles_for(expert_ids_RK.numel(), matrices.sizes, precision)
        else:
            tiles = rule_tiles(block_m, hidden_size, size, precision)

    # Experts of one row differ: nothing is gained by sorting its pairs.
    sort = route_later if len(hidden_RH) == 1 else route
    routed = sort(expert_ids_RK, len(matrices.gate_LIH), tiles.gate_up.block_m, local_slots_E)
    x = quantize(hidden_RH) if w8a8 else Rows(hidden_RH)
    h = gate_up(x, matrices, routed, tiles.gate_up)
    dtype = partial_dtype(hidden_RH.dtype)  # weighted outputs, too, may be beyond float16
    y_AH = down(h, matrices, weights_RK, routed, tiles.down, dtype)
    return reduce(y_AH, routed.positions, out_dtype or hidden_RH.dtype)
