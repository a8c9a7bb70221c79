"""The experts of one layer that have one width and one format, stacked on the device.

L rows of each matrix, taken or free; E experts of the layer. Which expert has which row stands in
a table on the device, which is changed in place: kernels and recorded graphs need not know of a
load or a drop.
"""

from __future__ import annotations

import torch

from expert_service.kernels.triton.backend.memory import Format
from expert_service.kernels.triton.matrices import ExpertMatrices, scale_shape
from expertmesh.model import ExpertWeights, Fp8ExpertWeights


class Stack:
    """Experts by row. A free row holds anything, and nothing reads it."""

    def __init__(
        self,
        form: Format,
        hidden_size: int,
        dtype: torch.dtype,
        experts: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        """Allocates `capacity` rows; `experts` is how many ids the layer has."""
        self.form = form
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._rows: dict[int, int] = {}
        self._free = list(range(capacity))[::-1]  # the lowest is taken first
        self.local_slots_E = torch.full((experts,), -1, dtype=torch.int32, device=device)
        self.matrices = self._allocate(capacity)

    def __contains__(self, expert: int) -> bool:
        return expert in self._rows

    @property
    def capacity(self) -> int:
        """Rows, taken or free."""
        return len(self.matrices.gate_LIH)

    @property
    def is_full(self) -> bool:
        """Whether the next expert needs `grow` first."""
        return not self._free

    def put(self, expert: int, weights: ExpertWeights | Fp8ExpertWeights) -> None:
        """Copies an expert into a free row, or over the one it has."""
        row = self._rows[expert] if expert in self._rows else self._free.pop()
        for matrix, source in zip(self.matrices, weights, strict=False):
            assert matrix is not None  # `matrices` has scales where `weights` has
            matrix[row].copy_(source)
        self._rows[expert] = row
        self.local_slots_E[expert] = row

    def drop(self, expert: int) -> None:
        """Frees an expert's row."""
        self.local_slots_E[expert] = -1
        self._free.append(self._rows.pop(expert))

    def grow(self, rows: int) -> None:
        """Adds rows, by copying this stack; for a moment there are two of it."""
        before = self.capacity
        larger = self._allocate(before + rows)
        for new, old in zip(larger, self.matrices, strict=True):
            if new is not None and old is not None:
                new[:before].copy_(old)
        self.matrices = larger
        self._free = [*range(before, before + rows)][::-1] + self._free

    def _allocate(self, rows: int) -> ExpertMatrices:
        hidden, width = self._hidden_size, self.form.width
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        dtype = self.form.weight_dtype(self._dtype)

        def empty(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=self._device)

        weights = [empty(shape, dtype) for shape in shapes]
        if not self.form.fp8:
            return ExpertMatrices(*weights)
        return ExpertMatrices(
            *weights, *(empty(scale_shape(*shape), torch.float32) for shape in shapes)
        )
