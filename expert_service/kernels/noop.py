"""Experts that compute nothing, so that a benchmark sees the path alone.

out[r] = hidden[r] * sum of weights[r, k] over the pairs asked of row r
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from expertmesh.model import ExpertWeights, Fp8ExpertWeights, Slot

_ROWS = 64


class NoopBackend:
    """Keeps no weights. Its answers are no model's: it is never chosen by "auto"."""

    takes_fp8 = False
    any_thread = True

    @property
    def name(self) -> str:
        """See Backend."""
        return "noop/cpu"

    def prepare(
        self, weights: ExpertWeights | Fp8ExpertWeights, pause: Callable[[], None]
    ) -> ExpertWeights | Fp8ExpertWeights:
        """See Backend."""
        return weights

    def load(self, slot: Slot, weights: ExpertWeights | Fp8ExpertWeights) -> None:
        """See Backend."""

    def drop(self, slot: Slot) -> None:
        """See Backend."""

    def finish_loading(self) -> None:
        """See Backend."""

    def compute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """See Backend."""
        # In numpy, whose calls cost a third of torch's between two requests.
        asked_RK = np.where(expert_ids_RK.numpy() >= 0, weights_RK.numpy(), np.float32(0.0))
        total_R1 = torch.from_numpy(np.add.reduce(asked_RK, 1, keepdims=True))
        out_RH = torch.empty_like(hidden_RH)
        for start in range(0, len(hidden_RH), _ROWS):  # what is in float32 stays in the cache
            rows = slice(start, start + _ROWS)
            torch.mul(hidden_RH[rows], total_R1[rows], out=out_RH[rows])
        return out_RH
