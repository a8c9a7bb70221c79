"""Compiles LLVM code for this CPU, and lays matrices out as it reads them. Without llvmlite, it can
be imported and says so."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BLOCK = 64  # outputs that are computed together: see `avx512_products`


class Matrix(NamedTuple):
    """Rows in memory that somebody else keeps."""

    address: int
    stride: int  # elements from a row to the next


def has_compiler() -> bool:
    """Whether llvmlite is installed."""
    return importlib.util.find_spec("llvmlite") is not None


def has_dot() -> bool:
    """Whether this CPU multiplies pairs of bfloat16 (AVX-512 BF16)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


class Library:
    """Compiled functions, and what keeps their code."""

    def __init__(self, text: str) -> None:
        """Compiles a module's text for this CPU."""
        # Here, so that nobody who does without needs llvmlite.
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(),
            features=binding.get_host_cpu_features().flatten(),
            opt=3,
        )
        module = binding.parse_assembly(text)
        options = binding.create_pipeline_tuning_options(speed_level=2)
        builder = binding.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        self._engine: Any = binding.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()

    def function(self, name: str, parameters: str) -> Callable[..., None]:
        """A function, which is called without the GIL, by any number of threads at the same time.

        `parameters` has a letter for each: "p" for an address, "i" for a number. It lives as long
        as the library.
        """
        kinds = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in parameters]
        return ctypes.CFUNCTYPE(None, *kinds)(self._engine.get_function_address(name))


def pack_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [N, K] of bfloat16 or int8 in the blocks that the kernels read; N is whole blocks,
    K whole groups. int32 [N / 64, groups, 64]."""
    outputs, inputs = matrix.shape
    groups = inputs * matrix.itemsize // 4
    words = matrix.contiguous().view(torch.int32).view(outputs // BLOCK, BLOCK, groups)
    return words.transpose(1, 2).contiguous()
