"""The sum of partial sums in one pass of our own code, on CPUs with AVX-512.

torch widens a block of rows, adds to it and rounds it in calls of their own, one for each server;
here every partial sum is read once, in float32 while it is added up, and the output written once.
The code is `avx512_sum_ir`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.dispatch import Contribution
from expertmesh.kernels.compiling import BLOCK, Library, has_compiler, has_dot

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_Int64 = npt.NDArray[np.int64]


class Avx512Sum:
    """See `expertmesh.dispatch.SumKernel`. Any number of threads may use it at the same time."""

    def __init__(self, *, with_dot: bool) -> None:
        """`with_dot`: with what AVX-512 BF16 has."""
        # Here, so that nobody who does without needs llvmlite.
        from router_service.kernels.avx512_sum_ir import generate

        self._library = Library(generate(has_dot=with_dot))
        self._sum = {
            dtype: self._library.function(f"sum_{suffix}", "ipppi")
            for dtype, suffix in _SUFFIXES.items()
        }

    def takes(self, out_TH: torch.Tensor, contributions: Sequence[Contribution]) -> bool:
        """Whether it can add these up."""
        dtype = out_TH.dtype
        if dtype not in self._sum or out_TH.shape[1] % BLOCK or not out_TH.is_contiguous():
            return False
        return all(part.dtype == dtype and part.is_contiguous() for _, part in contributions)

    def add(self, out_TH: torch.Tensor, contributions: Sequence[Contribution]) -> None:
        """Writes the sums."""
        rows, width = out_TH.shape
        addresses, offsets = _table(rows, width * out_TH.itemsize, contributions)
        places = addresses.ctypes.data, offsets.ctypes.data
        self._sum[out_TH.dtype](rows, *places, out_TH.data_ptr(), width // BLOCK)


def _table(
    rows: int, row_bytes: int, contributions: Sequence[Contribution]
) -> tuple[_Int64, _Int64]:
    """Where each row's parts lie, in the order of the contributions, row after row; and where in
    that list each row's begin."""
    table_TC = np.zeros((rows, len(contributions)), np.int64)
    steps = np.arange(rows) * row_bytes
    for column, (part_rows, part) in enumerate(contributions):
        if part_rows is None:
            np.add(steps, part.data_ptr(), out=table_TC[:, column])
        else:
            table_TC[part_rows, column] = steps[: len(part_rows)] + part.data_ptr()
    if all(part_rows is None for part_rows, _ in contributions):
        return table_TC, np.arange(rows + 1) * len(contributions)
    present_TC = table_TC != 0
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(present_TC.sum(1), out=offsets[1:])
    return table_TC[present_TC], offsets


@functools.cache
def create_avx512_sum() -> Avx512Sum | None:
    """Compiled once a process; None without AVX-512 or llvmlite, where torch has to do."""
    if not (torch.cpu._is_avx512_supported() and has_compiler()):
        return None
    return Avx512Sum(with_dot=has_dot())
