"""The truth that every backend is tested against: slow, obvious torch in float32.

    out[r] = sum over k of weights[r, k] * W_down @ (silu(W_gate @ x[r]) * (W_up @ x[r]))

where the W are those of expert ids[r, k], and pairs with id -1 are left out. R rows, H hidden
size, I intermediate size, K pairs asked per row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expertmesh.dispatch import partial_dtype
from expertmesh.model import ExpertWeights, Fp8ExpertWeights, Slot


def swiglu(hidden_RH: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """One expert on every row, [R, H] float32."""
    x_RH = hidden_RH.float()
    gate_RI = torch.nn.functional.silu(x_RH @ weights.gate.float().T)
    up_RI = x_RH @ weights.up.float().T
    return (gate_RI * up_RI) @ weights.down.float().T


class ReferenceBackend:
    """Implements `Backend` pair by pair in float32; only the result is rounded."""

    name = "reference/cpu"
    takes_fp8 = False
    any_thread = True

    def __init__(self) -> None:
        self._experts: dict[Slot, ExpertWeights] = {}

    def host_footprint(self, weights: int, dtype: torch.dtype) -> int:
        """See Backend: tensors are kept as they are."""
        return weights * dtype.itemsize

    def prepare(
        self, weights: ExpertWeights | Fp8ExpertWeights, pause: Callable[[], None]
    ) -> ExpertWeights | Fp8ExpertWeights:
        """The tensors as they are."""
        return weights

    def load(self, slot: Slot, weights: ExpertWeights | Fp8ExpertWeights) -> None:
        """Keeps the tensors as they are."""
        assert isinstance(weights, ExpertWeights)  # as `takes_fp8` says
        self._experts[slot] = weights

    def drop(self, slot: Slot) -> ExpertWeights:
        """Forgets one expert, and returns it. Raises KeyError when it is not held."""
        return self._experts.pop(slot)

    def finish_loading(self) -> None:
        """Nothing to warm up."""

    @torch.no_grad()
    def compute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """See `Backend.compute`."""
        out_RH = torch.zeros(hidden_RH.shape, dtype=torch.float32, device="cpu")
        for row, (ids, weights) in enumerate(
            zip(expert_ids_RK.tolist(), weights_RK.tolist(), strict=True)
        ):
            for expert, weight in zip(ids, weights, strict=True):
                if expert >= 0:
                    y_1H = swiglu(hidden_RH[row : row + 1], self._experts[Slot(layer, expert)])
                    out_RH[row] += weight * y_1H[0]
        return out_RH.to(partial_dtype(hidden_RH.dtype))
