"""Experts that compute nothing, so that a benchmark sees the path alone.

out[r] = hidden[r] * sum of weights[r, k] over the pairs asked of row r
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from expert_service.kernels.cpu.avx512 import KERNEL_DTYPES, Kernels, Pairs, compile_kernels
from expert_service.kernels.cpu.grouping import sum_by_row
from expertmesh.dispatch import partial_dtype
from expertmesh.kernels.compiling import BLOCK, Matrix, has_compiler
from expertmesh.model import ExpertWeights, Fp8ExpertWeights, Slot

#: From here on the sum of one row each, which widens nothing in memory, is the faster product.
_MANY_ROWS = 32


class NoopBackend:
    """Keeps no weights. Its answers are no model's: it is never chosen by "auto"."""

    takes_fp8 = False
    any_thread = True

    def __init__(self) -> None:
        self._kernels = compile_kernels("bf16") if has_compiler() else None
        self._numbers = torch.arange(1, device="cpu")

    @property
    def name(self) -> str:
        """See Backend."""
        return "noop/cpu"

    def host_footprint(self, weights: int, dtype: torch.dtype) -> int:
        """See Backend: nothing is kept."""
        return 0

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
        rows = hidden_RH.shape[0]
        if rows == 1:  # Python's own loop over a few pairs takes less than numpy's calls
            pairs = zip(expert_ids_RK[0].tolist(), weights_RK[0].tolist(), strict=True)
            total = sum(weight for expert, weight in pairs if expert >= 0)
            total_R1 = np.array([[total]], np.float32)
        else:  # In numpy, whose calls cost a third of torch's between two requests.
            asked_RK = np.where(expert_ids_RK.numpy() >= 0, weights_RK.numpy(), np.float32(0.0))
            total_R1 = np.add.reduce(asked_RK, 1, keepdims=True)
        if self._kernels is not None and _fits(hidden_RH):
            return self._multiply(self._kernels, hidden_RH, total_R1)
        factors_R1 = torch.from_numpy(total_R1)
        hidden_RH = hidden_RH.to(partial_dtype(hidden_RH.dtype))
        if rows >= _MANY_ROWS:
            offsets_R1 = torch.arange(rows + 1, device="cpu")
            return sum_by_row(hidden_RH, factors_R1[:, 0], offsets_R1[:-1], offsets_R1)
        out_RH = torch.empty_like(hidden_RH)
        return torch.mul(hidden_RH, factors_R1, out=out_RH)

    def _multiply(
        self, kernels: Kernels, hidden_RH: torch.Tensor, total_R1: npt.NDArray[np.float32]
    ) -> torch.Tensor:
        """The sum of one row each, in a call of our own."""
        rows, width = hidden_RH.shape
        if len(self._numbers) <= rows:
            self._numbers = torch.arange(2 * rows + 1, device="cpu")
        numbers, out_RH = self._numbers, torch.empty_like(hidden_RH)
        places = numbers.data_ptr()
        pairs = Pairs(places, total_R1.ctypes.data, places, places, (numbers,))
        matrices = Matrix(hidden_RH.data_ptr(), width), pairs, Matrix(out_RH.data_ptr(), width)
        kernels.sum(hidden_RH.dtype, *matrices, width // BLOCK, 0, rows)
        return out_RH


def _fits(hidden_RH: torch.Tensor) -> bool:
    """Whether kernels of our own take such rows."""
    dtype, width = hidden_RH.dtype, hidden_RH.shape[1]
    return dtype in KERNEL_DTYPES and width % BLOCK == 0 and hidden_RH.is_contiguous()
