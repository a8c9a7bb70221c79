"""Kernels of our own for experts on CPUs with AVX-512, compiled when a server starts.

They are there where llvmlite and the CPU have what they need (`compile_kernels`), and read matrices
in blocks of outputs, as oneDNN packs them, too. The code is `avx512_ir`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from expert_service.kernels.cpu.block_product import BlockProduct
from expert_service.kernels.cpu.onednn_cpu import fall_back, has_tiles
from expertmesh.kernels.compiling import Library, Matrix, has_compiler, has_dot

KERNEL_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}
#: More rows of an expert are left to oneDNN where its instructions do more a cycle (AMX), or ours
#: have to widen bfloat16 first. So few are multiplied sooner than their weights are read.
_FEW_ROWS = 4


class Rows(NamedTuple):
    """Rows as they are multiplied, and where the scales of rows in bytes are."""

    values: Matrix
    scales: int


class Pairs(NamedTuple):
    """Where the tensors of a `Grouping` are, and the tensors, to keep them."""

    rows: int
    weights: int
    places: int
    offsets: int
    kept: Sequence[torch.Tensor]

    @staticmethod
    def of(
        rows: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, offsets: torch.Tensor
    ) -> Pairs:
        """The fields of a `Grouping`; weights are float32, all else is int64."""
        kept = rows, weights.contiguous(), places, offsets
        at_rows, at_weights, at_places, at_offsets = (tensor.data_ptr() for tensor in kept)
        return Pairs(at_rows, at_weights, at_places, at_offsets, kept)


class Kernels:
    """The compiled functions. Any number of threads may call them at the same time."""

    def __init__(self, library: Library, most_rows: int | None) -> None:
        """`most_rows` is up to how many rows of an expert they are faster than oneDNN's, None for
        any."""
        self._library = library
        self.most_rows = most_rows
        function = library.function

        def functions(name: str, parameters: str) -> dict[torch.dtype, Callable[..., None]]:
            return {
                dtype: function(f"{name}_{suffix}", parameters)
                for dtype, suffix in KERNEL_DTYPES.items()
            }

        self._gate_up = function("gate_up", "pipipppi")
        self._down = functions("down", "pipipppi")
        self._sum = functions("sum", "iipippppi")
        self._round = functions("round", "iipiipip")

    def gate_up(self, x_RH: Rows, rows_S: int, h_SI: Matrix, jobs: Sequence[BlockProduct]) -> None:
        """h = silu(matrix @ x) * (second @ x) at the jobs' places, whose rows are at `rows_S`."""
        self._gate_up(_array(jobs), len(jobs), *x_RH.values, rows_S, x_RH.scales, *h_SI)

    def down(
        self,
        dtype: torch.dtype,
        h_SI: Rows,
        identity_S: int,
        y_SH: Matrix,
        jobs: Sequence[BlockProduct],
    ) -> None:
        """y = matrix @ h at the jobs' places; `identity_S` has each place's own number."""
        self._down[dtype](_array(jobs), len(jobs), *h_SI.values, identity_S, h_SI.scales, *y_SH)

    def sum(
        self,
        dtype: torch.dtype,
        y_SH: Matrix,
        pairs: Pairs,
        out_RH: Matrix,
        blocks: int,
        start: int,
        stop: int,
    ) -> None:
        """out[r] = the sum of weight * y over the pairs of row r, for start <= r < stop."""
        of_pairs = pairs.places, pairs.weights, pairs.offsets
        self._sum[dtype](start, stop, *y_SH, *of_pairs, out_RH.address, blocks)

    def round(
        self, dtype: torch.dtype, x: Matrix, out: Rows, blocks: int, start: int, stop: int
    ) -> None:
        """The rows start .. stop - 1 of x in bytes, with a scale for each."""
        self._round[dtype](start, stop, *x, blocks, *out.values, out.scales)


def _array(jobs: Sequence[BlockProduct]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (len(jobs) * len(BlockProduct._fields)))(*chain.from_iterable(jobs))


@functools.cache
def compile_kernels(weights: str) -> Kernels | None:
    """The kernels for "bf16" or "int8" weights, once a process, in half a second.

    None where there are none: products are oneDNN's then. That is without AVX-512, and without
    llvmlite, which a `FallbackWarning` says.
    """
    if not torch.cpu._is_avx512_supported():
        return None
    if weights == "int8" and not torch.cpu._is_vnni_supported():
        return None
    if not has_compiler():
        fall_back("llvmlite is not installed: products are oneDNN's, slower for few rows")
        return None
    return Kernels(*_compile(weights, has_dot()))


def _compile(weights: str, with_dot: bool) -> tuple[Library, int | None]:
    """What `Kernels` asks for; `with_dot` is for `generate`."""
    # Here, so that nobody who does without needs llvmlite.
    from expert_service.kernels.cpu.avx512_ir import generate

    library = Library(generate(weights, has_dot=with_dot))
    is_slow = weights == "bf16" and not with_dot
    return library, _FEW_ROWS if is_slow or has_tiles() else None


def is_packed_at(address: int, blocks: torch.Tensor) -> bool:
    """Whether the memory there has the same content."""
    content = (ctypes.c_int32 * blocks.numel()).from_address(address)
    return torch.equal(torch.frombuffer(content, dtype=torch.int32), blocks.view(-1))
