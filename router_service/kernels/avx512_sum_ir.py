"""Generates LLVM code for AVX-512: the sum of rows that lie anywhere in memory."""

from __future__ import annotations

from llvmlite import ir

from expertmesh.kernels.avx512_products import SUMS, VECTORS, load_vector, outputs_at, store
from expertmesh.kernels.compiling import BLOCK
from expertmesh.kernels.llvm_building import (
    BF16,
    F32,
    I64,
    PTR,
    declare,
    element_at,
    i64,
    load,
    loop,
)

_DTYPES = {"bf16": BF16, "f32": F32}


def generate(*, has_dot: bool) -> str:
    """The module's text; `has_dot` says that the CPU has AVX-512 BF16.

        sum_DTYPE(rows, parts, offsets, out, blocks)
            out[r] = sum of the rows at the addresses parts[p], offsets[r] <= p < offsets[r + 1]

    DTYPE, bf16 or f32, is of every row; sums are in float32, in the order of p, and rounded once.
    Addresses and offsets are i64. An output may be one of its own parts: each block of 64 elements
    is read from every part before it is written.
    """
    module = ir.Module("sum")
    for name, dtype in _DTYPES.items():
        _define_sum(module, f"sum_{name}", dtype, has_dot)
    return str(module)


def _define_sum(module: ir.Module, name: str, dtype: ir.Type, has_dot: bool) -> None:
    function = declare(module, name, I64, PTR, PTR, PTR, I64)
    rows, parts, offsets, out, blocks = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    width = builder.mul(blocks, i64(BLOCK))
    with loop(builder, rows) as (row, _, _):
        start, end = (
            load(builder, element_at(builder, offsets, row, I64), I64, at) for at in (0, 1)
        )
        with loop(builder, blocks) as (block, _, _):
            zeros = [ir.Constant(SUMS, None)] * VECTORS
            with loop(builder, end, zeros, start=start) as (part, before, after):
                address = builder.inttoptr(load(builder, parts, I64, part), PTR)
                at = outputs_at(builder, address, width, i64(0), block, dtype)
                for vector, total in enumerate(before):
                    after.append(builder.fadd(total, load_vector(builder, at, vector, dtype)))
            at = outputs_at(builder, out, width, row, block, dtype)
            for vector, total in enumerate(before):
                store(builder, total, at, vector, dtype, has_dot=has_dot)
    builder.ret_void()
