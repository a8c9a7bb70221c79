"""Kernels of our own for bfloat16 experts on CPUs with AVX-512, compiled when a server starts.

They read matrices as oneDNN packs them, so that both can work with the same memory, and are there
where llvmlite and the CPU have what they need (`compile_kernels`). The code is `avx512_ir`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from expert_service.kernels.onednn_cpu import fall_back, has_tiles

BLOCK = 64  # outputs: see `avx512_ir`
_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
#: More rows of an expert are left to oneDNN where its instructions do more a cycle (AMX), or ours
#: have to widen bfloat16 first. So few are multiplied sooner than their weights are read.
_FEW_ROWS = 4


class Job(NamedTuple):
    """The fields of `avx512_ir.JOB`."""

    place: int
    rows: int
    matrix: int  # addresses
    second: int
    first: int
    stop: int
    pairs: int


class Matrix(NamedTuple):
    """Rows in memory that somebody else keeps."""

    address: int
    stride: int  # elements from a row to the next

    def before(self, rows: int) -> Matrix:
        """The same, as if so many rows of two-byte elements were in front of them."""
        return Matrix(self.address - 2 * rows * self.stride, self.stride)


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

    def __init__(self, engine: Any, most_rows: int | None) -> None:
        """`engine` holds the code; `most_rows` is up to how many rows of an expert it is faster
        than oneDNN's, None for any."""
        self._engine = engine
        self.most_rows = most_rows
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        on_jobs = (pointer, number, pointer, number, pointer, pointer, number)
        on_rows = (number, number, pointer, number, pointer, pointer, pointer, pointer, number)

        def function(name: str, parameters: tuple[Any, ...]) -> Callable[..., None]:
            # Called without the GIL.
            address = engine.get_function_address(name)
            return ctypes.CFUNCTYPE(None, *parameters)(address)

        self._gate_up = function("gate_up", on_jobs)
        self._down = {dtype: function(f"down_{name}", on_jobs) for dtype, name in _NAMES.items()}
        self._sum = {dtype: function(f"sum_{name}", on_rows) for dtype, name in _NAMES.items()}

    def gate_up(self, x_RH: Matrix, rows_S: int, h_SI: Matrix, jobs: Sequence[Job]) -> None:
        """h = silu(matrix @ x) * (second @ x) at the jobs' places, whose rows are at `rows_S`."""
        self._gate_up(_array(jobs), len(jobs), *x_RH, rows_S, *h_SI)

    def down(
        self, dtype: torch.dtype, h_SI: Matrix, identity_S: int, y_SH: Matrix, jobs: Sequence[Job]
    ) -> None:
        """y = matrix @ h at the jobs' places; `identity_S` has each place's own number."""
        self._down[dtype](_array(jobs), len(jobs), *h_SI, identity_S, *y_SH)

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


def _array(jobs: Sequence[Job]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (len(jobs) * len(Job._fields)))(*chain.from_iterable(jobs))


@functools.cache
def compile_kernels() -> Kernels | None:
    """The kernels, once a process, in 0.2 s; None where there are none: products are oneDNN's then.

    That is without AVX-512, where oneDNN does not compute in bfloat16 either, and without llvmlite,
    which a `FallbackWarning` says.
    """
    if not torch.cpu._is_avx512_supported():
        return None
    if importlib.util.find_spec("llvmlite") is None:
        fall_back("llvmlite is not installed: products are oneDNN's, slower for few rows")
        return None
    return Kernels(*_compile())


def _compile(has_dot: bool | None = None) -> tuple[Any, int | None]:
    """What `Kernels` asks for; `has_dot` is for `generate`, and as the CPU says if not given."""
    # Here, so that nobody who does without needs llvmlite.
    from llvmlite import binding

    from expert_service.kernels.avx512_ir import generate

    features = binding.get_host_cpu_features()
    if has_dot is None:
        has_dot = bool(features.get("avx512bf16"))
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    module = binding.parse_assembly(generate(has_dot=has_dot))
    options = binding.create_pipeline_tuning_options(speed_level=2)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine, None if has_dot and not has_tiles() else _FEW_ROWS


@functools.cache
def is_packed_in_blocks(outputs: int, inputs: int) -> bool:
    """Whether oneDNN packs bfloat16 matrices of that shape as the kernels read them.

    It may choose another layout on another CPU: a matrix with known content is packed to see.
    """
    if outputs % BLOCK or inputs % 2:
        return False
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(outputs, inputs, generator=generator).to(torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
    if torch.ops.mkldnn._nbytes(packed) != matrix.nbytes:
        return False
    address = torch.ops.mkldnn.data_ptr(packed)
    content = (ctypes.c_int16 * matrix.numel()).from_address(address)
    blocks = matrix.view(outputs // BLOCK, BLOCK, inputs // 2, 2).transpose(1, 2)
    expected = blocks.contiguous().view(torch.int16).view(-1)
    return torch.equal(torch.frombuffer(content, dtype=torch.int16), expected)
