"""The weights of the experts that a device holds, as the Triton kernels read them.

L slots, H hidden size, I intermediate size. FP8 weights are DeepSeek's: e4m3, and one float32
factor (`weight_scale_inv`) for each block of 128 rows and 128 columns, ragged at the edges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from expert_service.kernels.triton.tables.tiles import Precision

#: Rows, and columns, of FP8 weights that share a scale; columns of activations that do.
SCALE_BLOCK = 128
FP8 = torch.float8_e4m3fn

_PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    FP8: "w8a16",
}


class ExpertMatrices(NamedTuple):
    """One matrix of each kind for each slot; scales where the weights are FP8.

    Scales are [L, B, C] for a matrix [L, rows, columns]: B = ceil(rows / 128) and
    C = ceil(columns / 128). All three are there, or none.
    """

    gate_LIH: torch.Tensor
    up_LIH: torch.Tensor
    down_LHI: torch.Tensor
    gate_scale_LBC: torch.Tensor | None = None
    up_scale_LBC: torch.Tensor | None = None
    down_scale_LBC: torch.Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        """Whether the weights are FP8."""
        return self.gate_LIH.dtype == FP8

    def precision(self, w8a8: bool = False) -> Precision:
        """What is multiplied. ValueError for a dtype without kernels, or `w8a8` without FP8."""
        dtype = self.gate_LIH.dtype
        if dtype not in _PRECISIONS or (w8a8 and dtype != FP8):
            wanted = str(FP8) if w8a8 else ", ".join(map(str, _PRECISIONS))
            raise ValueError(f"weights are {dtype}; expected {wanted}")
        return "w8a8" if w8a8 else _PRECISIONS[dtype]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """L, H and I."""
        num_slots, size, hidden_size = self.gate_LIH.shape
        return num_slots, hidden_size, size


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """How many scales an FP8 matrix of that size has, down and across."""
    return -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK)
