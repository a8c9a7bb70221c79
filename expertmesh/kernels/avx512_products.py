"""Products of rows with matrices in blocks, in LLVM code for AVX-512: what kernels for CPUs share.

A matrix [N, K] is cut into blocks of 64 outputs. A block has, group after group of inputs,
the groups of its outputs: [N / 64, K / 2, 64, 2] of bfloat16, or [N / 64, K / 4, 64, 4] of signed
bytes. A group has 32 bits; of one row, 64 sums are four vectors of 16. The sums of six rows stay in
registers while a block is read from start to end, which is the order of its addresses: the CPU's
prefetchers need no help. More rows find it in L2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llvmlite import ir

from expertmesh.kernels.compiling import BLOCK
from expertmesh.kernels.llvm_building import (
    BF16,
    F32,
    I8,
    I32,
    I64,
    PTR,
    constant,
    declare,
    element_at,
    i64,
    intrinsic,
    least,
    load,
    loop,
    splat,
)

#: Vectors of sums that the outputs of one block make.
VECTORS = 4
LANES = BLOCK // VECTORS
#: Rows whose sums fit into AVX-512's 32 registers, beside the weights of one group of inputs.
ROWS_IN_REGISTERS = 6
#: Rows whose sums are kept at a time, in L1; the block that they share comes from L2 meanwhile.
PANEL = 4 * ROWS_IN_REGISTERS
SUMS = ir.VectorType(F32, LANES)
BITS = ir.VectorType(I32, LANES)
PAIRS = ir.VectorType(BF16, 2 * LANES)


#: The sums of one row, a group of its inputs and the weights of it: the sums with their product.
Dot = Callable[[ir.IRBuilder, Sequence[ir.Value], ir.Value, Sequence[ir.Value]], list[ir.Value]]


class Kind(NamedTuple):
    """What differs between formats of weights."""

    dot: Dot
    values: ir.Type  # of rows of x and h as they are multiplied
    sums: ir.Type  # of vectors of sums
    wide: ir.Type  # of h as `gate_up` writes it
    has_dot: bool  # the CPU has AVX-512 BF16


def _define_product_of(module: ir.Module, rows: int, kind: Kind) -> ir.Function:
    """sums[r] = block @ x[row[r]], for `rows` rows: [rows, 64]."""
    function = declare(module, f"product_{rows}", PTR, I64, PTR, PTR, I64, PTR)
    function.attributes.add("noinline")  # one loop for all callers: caches are full of weights
    x, stride, row, block, groups, sums = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    starts = [
        element_at(builder, x, builder.mul(load(builder, row, I64, r), stride), kind.values)
        for r in range(rows)
    ]
    zeros = [ir.Constant(kind.sums, None)] * (rows * VECTORS)
    with loop(builder, groups, zeros) as (group, before, after):
        weights_at = element_at(builder, block, builder.mul(group, i64(BLOCK)), I32)
        weights = [load(builder, weights_at, BITS, vector, 4) for vector in range(VECTORS)]
        for r, start in enumerate(starts):
            value = load(builder, start, I32, group, 1)
            after += kind.dot(builder, before[r * VECTORS : (r + 1) * VECTORS], value, weights)
    for at, total in enumerate(before):
        builder.store(total, element_at(builder, sums, i64(at), kind.sums), align=64)
    builder.ret_void()
    return function


def dot_pairs(
    builder: ir.IRBuilder, sums: Sequence[ir.Value], pair: ir.Value, weights: Sequence[ir.Value]
) -> list[ir.Value]:
    """sums + pair . weights, with AVX-512 BF16."""
    instruction = intrinsic(
        builder.module, "llvm.x86.avx512bf16.dpbf16ps.512", SUMS, SUMS, PAIRS, PAIRS
    )
    pairs = builder.bitcast(splat(builder, pair, BITS), PAIRS)
    return [
        builder.call(instruction, [total, pairs, builder.bitcast(weight, PAIRS)])
        for total, weight in zip(sums, weights, strict=True)
    ]


def dot_widened(
    builder: ir.IRBuilder, sums: Sequence[ir.Value], pair: ir.Value, weights: Sequence[ir.Value]
) -> list[ir.Value]:
    """sums + pair . weights, each element as a float32: a bfloat16 is the upper half of one."""
    fma = intrinsic(builder.module, "llvm.fma.v16f32", SUMS, SUMS, SUMS, SUMS)

    def halves(both: ir.Value, kind: ir.Type, single: ir.Type) -> list[ir.Value]:
        return [
            builder.bitcast(builder.shl(both, constant(kind, 16)), single),
            builder.bitcast(builder.and_(both, constant(kind, 0xFFFF0000)), single),
        ]

    values = [splat(builder, value, SUMS) for value in halves(pair, I32, F32)]
    results = []
    for total, weight in zip(sums, weights, strict=True):
        for value, wide in zip(values, halves(weight, BITS, SUMS), strict=True):
            total = builder.call(fma, [value, wide, total])
        results.append(total)
    return results


def dot_bytes(
    builder: ir.IRBuilder, sums: Sequence[ir.Value], group: ir.Value, weights: Sequence[ir.Value]
) -> list[ir.Value]:
    """sums + group . weights, of unsigned with signed bytes, with AVX-512 VNNI."""
    instruction = intrinsic(builder.module, "llvm.x86.avx512.vpdpbusd.512", BITS, BITS, BITS, BITS)
    values = splat(builder, group, BITS)
    return [
        builder.call(instruction, [total, values, weight])
        for total, weight in zip(sums, weights, strict=True)
    ]


def define_product(module: ir.Module, kind: Kind) -> ir.Function:
    """product(x, stride, row, count, block, groups, sums): sums[r] = block @ x[row[r]] for `count`
    rows, as many at a time as registers hold."""
    kernels = [_define_product_of(module, rows, kind) for rows in range(1, ROWS_IN_REGISTERS + 1)]
    function = declare(module, "product", PTR, I64, PTR, I64, PTR, I64, PTR)
    x, stride, row, count, block, groups, sums = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    with loop(builder, count, step=len(kernels)) as (done, _, _):
        row_at = element_at(builder, row, done, I64)
        sums_at = element_at(builder, sums, builder.mul(done, i64(BLOCK)), F32)
        joined = function.append_basic_block()
        choice = builder.switch(least(builder, builder.sub(count, done), len(kernels)), joined)
        for rows, kernel in enumerate(kernels, 1):
            case = function.append_basic_block()
            choice.add_case(i64(rows), case)
            builder.position_at_end(case)
            builder.call(kernel, [x, stride, row_at, block, groups, sums_at])
            builder.branch(joined)
        builder.position_at_end(joined)
    builder.ret_void()
    return function


def block_of(
    builder: ir.IRBuilder, matrix: ir.Value, block: ir.Value, groups: ir.Value
) -> ir.Value:
    """The address of a block of a matrix."""
    start = builder.mul(builder.mul(block, groups), i64(BLOCK))
    return element_at(builder, builder.inttoptr(matrix, PTR), start, I32)


def outputs_at(
    builder: ir.IRBuilder,
    base: ir.Value,
    stride: ir.Value,
    place: ir.Value,
    block: ir.Value,
    dtype: ir.Type,
) -> ir.Value:
    """The address of a block's outputs in the row of a place."""
    start = builder.add(builder.mul(place, stride), builder.mul(block, i64(BLOCK)))
    return element_at(builder, base, start, dtype)


def store(
    builder: ir.IRBuilder,
    value: ir.Value,
    base: ir.Value,
    vector: int,
    dtype: ir.Type,
    *,
    has_dot: bool,
) -> None:
    """`has_dot`: the CPU has AVX-512 BF16, which also rounds to bfloat16."""
    if dtype == BF16 and has_dot:
        value = builder.fptrunc(value, ir.VectorType(dtype, LANES))
    elif dtype == BF16:
        value = _rounded(builder, value)
    elif dtype == I8:
        value = builder.trunc(value, ir.VectorType(dtype, LANES))
    builder.store(value, element_at(builder, base, i64(vector * LANES), dtype), align=1)


def _rounded(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The bits of the nearest bfloat16, of two as near of the even one. LLVM's own truncation calls
    a function that is not there, on CPUs without an instruction for it."""
    bits = builder.bitcast(value, BITS)
    odd = builder.and_(builder.lshr(bits, constant(BITS, 16)), constant(BITS, 1))
    nearest = builder.add(bits, builder.add(odd, constant(BITS, 0x7FFF)))
    # What is added would make another number of a NaN, or an infinity.
    quiet = builder.or_(bits, constant(BITS, 0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest)
    return builder.trunc(builder.lshr(chosen, constant(BITS, 16)), ir.VectorType(_I16, LANES))


def load_vector(builder: ir.IRBuilder, base: ir.Value, vector: int, dtype: ir.Type) -> ir.Value:
    at = element_at(builder, base, i64(vector * LANES), dtype)
    value = builder.load(at, typ=ir.VectorType(dtype, LANES), align=2)
    return value if dtype == F32 else builder.fpext(value, SUMS)


def allocate_sums(builder: ir.IRBuilder) -> ir.Value:
    """[PANEL, 64] on the stack."""
    sums = builder.alloca(SUMS, PANEL * VECTORS)
    sums.align = 64
    return sums


_I16 = ir.IntType(16)
#: exp(r) for |r| <= ln(2) / 2, by Taylor: the first term left out is below 1.2e-7, an ulp.
_EXP = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0]
_LOG2_E = 1.4426950408889634
#: ln(2) in two parts: n times the first is exact in float32 for every n that occurs.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
#: Beyond, exp is infinite, or below the numbers that float32 has in full precision.
_EXP_MOST, _EXP_LEAST = 88.0, -87.0


def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2^n exp(r), x = n ln(2) + r. For less than -87 the value there, and one for NaN."""

    def call(name: str, *values: ir.Value) -> ir.Value:
        kinds = [SUMS] * len(values)
        return builder.call(intrinsic(builder.module, f"llvm.{name}.v16f32", SUMS, *kinds), values)

    def number(value: float) -> ir.Constant:
        return constant(SUMS, value)

    is_infinite = builder.fcmp_ordered(">", x, number(_EXP_MOST))
    x = call("maxnum", call("minnum", x, number(_EXP_MOST)), number(_EXP_LEAST))
    n = call("roundeven", builder.fmul(x, number(_LOG2_E)))
    r = call("fma", n, number(-_LN2_HIGH), x)
    r = call("fma", n, number(-_LN2_LOW), r)
    value = number(_EXP[0])
    for factor in _EXP[1:]:
        value = call("fma", value, r, number(factor))
    exponent = builder.shl(builder.fptosi(n, BITS), constant(BITS, 23))
    power = builder.bitcast(builder.add(builder.bitcast(value, BITS), exponent), SUMS)
    return builder.select(is_infinite, number(math.inf), power)
