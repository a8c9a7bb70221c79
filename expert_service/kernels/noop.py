"""Experts that compute nothing, so that a benchmark sees the path alone.

out[r] = hidden[r] * sum of weights[r, k] over the pairs asked of row r
"""

from __future__ import annotations

import torch

from expertmesh.model import ExpertWeights, Slot


class NoopBackend:
    """Keeps no weights. Its answers are no model's: it is never chosen by "auto"."""

    @property
    def name(self) -> str:
        """See Backend."""
        return "noop/cpu"

    def load(self, slot: Slot, weights: ExpertWeights) -> None:
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
        total_R1 = torch.where(expert_ids_RK >= 0, weights_RK, 0.0).sum(1, keepdim=True)
        return (hidden_RH * total_R1).to(hidden_RH.dtype)
