"""Generates LLVM code for AVX-512: products with matrices in blocks.

A matrix [N, K] is cut into blocks of 64 outputs. A block has, group after group of inputs,
the groups of its outputs: [N / 64, K / 2, 64, 2] of bfloat16, or [N / 64, K / 4, 64, 4] of signed
bytes. A group has 32 bits; of one row, 64 sums are four vectors of 16. The sums of six rows stay in
registers while a block is read from start to end, which is the order of its addresses: the CPU's
prefetchers need no help. More rows find it in L2.

All functions take whole jobs (`avx512.Job`); addresses and numbers are i64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from llvmlite import ir

from expert_service.kernels.avx512 import BLOCK, Job
from expert_service.kernels.llvm_building import (
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
_VECTORS = 4
_LANES = BLOCK // _VECTORS
#: Rows whose sums fit into AVX-512's 32 registers, beside the weights of one group of inputs.
ROWS_IN_REGISTERS = 6
#: Rows whose sums are kept at a time, in L1; the block that they share comes from L2 meanwhile.
_PANEL = 4 * ROWS_IN_REGISTERS
_SUMS = ir.VectorType(F32, _LANES)
_BITS = ir.VectorType(I32, _LANES)
_PAIRS = ir.VectorType(BF16, 2 * _LANES)


#: The sums of one row, a group of its inputs and the weights of it: the sums with their product.
_Dot = Callable[[ir.IRBuilder, Sequence[ir.Value], ir.Value, Sequence[ir.Value]], list[ir.Value]]


class _Kind(NamedTuple):
    """What differs between formats of weights."""

    dot: _Dot
    values: ir.Type  # of rows of x and h as they are multiplied
    sums: ir.Type  # of vectors of sums
    wide: ir.Type  # of h as `gate_up` writes it


def generate(weights: str, *, has_dot: bool) -> str:
    """The module's text for weights that are "bf16" or "int8".

        gate_up(jobs, count, x, stride, rows, scales, h, h_stride)
            h[place] = silu(matrix @ x[rows[place]]) * (second @ x[rows[place]])
        down_DTYPE(jobs, count, h, stride, rows, scales, y, y_stride)
            y[place] = matrix @ h[rows[place]]
        sum_DTYPE(first, stop, y, stride, places, weights, offsets, out, blocks)
            out[r] = sum of weights[p] * y[places[p]] over offsets[r] <= p < offsets[r + 1]
        round_DTYPE(first, stop, x, stride, blocks, out, out_stride, scales)
            scales[r] = max(|x[r]|, 2^-119) / 127; out[r] = round(x[r] / scales[r]) + 128

    DTYPE is of y, out and x: bf16 or f32. For bf16 weights x and h are bfloat16, without scales.
    For int8, which need AVX-512 VNNI, x, and h as `down` reads it, are what `round` gives, and h as
    `gate_up` writes it is float32. Indices are int64, weights, scales and sums float32, sums of
    bytes int32; strides are between rows, in elements.

    `has_dot`: the CPU has AVX-512 BF16, which multiplies pairs of bfloat16; else they are widened.
    """
    module = ir.Module("experts")
    if weights == "int8":
        kind = _Kind(_dot_bytes, I8, _BITS, F32)
    else:
        kind = _Kind(_dot_pairs if has_dot else _dot_widened, BF16, _SUMS, BF16)
    kernels = [_define_product(module, rows, kind) for rows in range(1, ROWS_IN_REGISTERS + 1)]
    product = _define_product_of_any(module, kernels)
    _define_gate_up(module, product, kind)
    for name, dtype in _DTYPES.items():
        _define_down(module, product, kind, f"down_{name}", dtype)
        _define_sum(module, f"sum_{name}", dtype)
        _define_round(module, f"round_{name}", dtype)
    return str(module)


_DTYPES = {"bf16": BF16, "f32": F32}


def _define_product(module: ir.Module, rows: int, kind: _Kind) -> ir.Function:
    """sums[r] = block @ x[row[r]], for `rows` rows: [rows, 64]."""
    function = declare(module, f"product_{rows}", PTR, I64, PTR, PTR, I64, PTR)
    function.attributes.add("noinline")  # one loop for all callers: caches are full of weights
    x, stride, row, block, groups, sums = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    starts = [
        element_at(builder, x, builder.mul(load(builder, row, I64, r), stride), kind.values)
        for r in range(rows)
    ]
    zeros = [ir.Constant(kind.sums, None)] * (rows * _VECTORS)
    with loop(builder, groups, zeros) as (group, before, after):
        weights_at = element_at(builder, block, builder.mul(group, i64(BLOCK)), I32)
        weights = [load(builder, weights_at, _BITS, vector, 4) for vector in range(_VECTORS)]
        for r, start in enumerate(starts):
            value = load(builder, start, I32, group, 1)
            after += kind.dot(builder, before[r * _VECTORS : (r + 1) * _VECTORS], value, weights)
    for at, total in enumerate(before):
        builder.store(total, element_at(builder, sums, i64(at), kind.sums), align=64)
    builder.ret_void()
    return function


def _dot_pairs(
    builder: ir.IRBuilder, sums: Sequence[ir.Value], pair: ir.Value, weights: Sequence[ir.Value]
) -> list[ir.Value]:
    """sums + pair . weights, with AVX-512 BF16."""
    instruction = intrinsic(
        builder.module, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, _SUMS, _PAIRS, _PAIRS
    )
    pairs = builder.bitcast(splat(builder, pair, _BITS), _PAIRS)
    return [
        builder.call(instruction, [total, pairs, builder.bitcast(weight, _PAIRS)])
        for total, weight in zip(sums, weights, strict=True)
    ]


def _dot_widened(
    builder: ir.IRBuilder, sums: Sequence[ir.Value], pair: ir.Value, weights: Sequence[ir.Value]
) -> list[ir.Value]:
    """sums + pair . weights, each element as a float32: a bfloat16 is the upper half of one."""
    fma = intrinsic(builder.module, "llvm.fma.v16f32", _SUMS, _SUMS, _SUMS, _SUMS)

    def halves(both: ir.Value, kind: ir.Type, single: ir.Type) -> list[ir.Value]:
        return [
            builder.bitcast(builder.shl(both, constant(kind, 16)), single),
            builder.bitcast(builder.and_(both, constant(kind, 0xFFFF0000)), single),
        ]

    values = [splat(builder, value, _SUMS) for value in halves(pair, I32, F32)]
    results = []
    for total, weight in zip(sums, weights, strict=True):
        for value, wide in zip(values, halves(weight, _BITS, _SUMS), strict=True):
            total = builder.call(fma, [value, wide, total])
        results.append(total)
    return results


def _dot_bytes(
    builder: ir.IRBuilder, sums: Sequence[ir.Value], group: ir.Value, weights: Sequence[ir.Value]
) -> list[ir.Value]:
    """sums + group . weights, of unsigned with signed bytes, with AVX-512 VNNI."""
    instruction = intrinsic(
        builder.module, "llvm.x86.avx512.vpdpbusd.512", _BITS, _BITS, _BITS, _BITS
    )
    values = splat(builder, group, _BITS)
    return [
        builder.call(instruction, [total, values, weight])
        for total, weight in zip(sums, weights, strict=True)
    ]


def _define_product_of_any(module: ir.Module, kernels: Sequence[ir.Function]) -> ir.Function:
    """sums[r] = block @ x[row[r]], for any number of rows: as many at a time as registers hold."""
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


def _define_gate_up(module: ir.Module, product: ir.Function, kind: _Kind) -> None:
    function = declare(module, "gate_up", *(PTR, I64, PTR, I64), *(PTR, PTR, PTR, I64))
    jobs, count, x, stride, rows_at, scales, h, h_stride = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    gates, ups = (_allocate_sums(builder) for _ in range(2))
    with _panels(builder, jobs, count) as (job, block, place, rows):
        row = element_at(builder, rows_at, place, I64)
        for matrix, sums in (("matrix", gates), ("second", ups)):
            address = _block_of(builder, job[matrix], block, job["groups"])
            builder.call(product, [x, stride, row, rows, address, job["groups"], sums])
        with loop(builder, rows) as (r, _, _):
            out = _outputs_at(builder, h, h_stride, builder.add(place, r), block, kind.wide)
            scale = _row_scale(builder, kind, scales, row, r)
            for vector in range(_VECTORS):
                gate, up = (
                    _meant(builder, kind, sums, r, vector, job[side], block, scale)
                    for sums, side in ((gates, "side"), (ups, "second_side"))
                )
                _store(builder, builder.fmul(_silu(builder, gate), up), out, vector, kind.wide)
    builder.ret_void()


def _define_down(
    module: ir.Module, product: ir.Function, kind: _Kind, name: str, dtype: ir.Type
) -> None:
    function = declare(module, name, *(PTR, I64, PTR, I64), *(PTR, PTR, PTR, I64))
    jobs, count, h, stride, rows_at, scales, y, y_stride = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    sums = _allocate_sums(builder)
    with _panels(builder, jobs, count) as (job, block, place, rows):
        row = element_at(builder, rows_at, place, I64)
        address = _block_of(builder, job["matrix"], block, job["groups"])
        builder.call(product, [h, stride, row, rows, address, job["groups"], sums])
        with loop(builder, rows) as (r, _, _):
            out = _outputs_at(builder, y, y_stride, builder.add(place, r), block, dtype)
            scale = _row_scale(builder, kind, scales, row, r)
            for vector in range(_VECTORS):
                value = _meant(builder, kind, sums, r, vector, job["side"], block, scale)
                _store(builder, value, out, vector, dtype)
    builder.ret_void()


def _row_scale(
    builder: ir.IRBuilder, kind: _Kind, scales: ir.Value, row: ir.Value, r: ir.Value
) -> ir.Value | None:
    """The scale of the row `row[r]`, in every lane; None where rows have none."""
    if kind.sums != _BITS:
        return None
    index = load(builder, row, I64, r)
    return splat(builder, load(builder, scales, F32, index, 4), _SUMS)


def _meant(
    builder: ir.IRBuilder,
    kind: _Kind,
    sums: ir.Value,
    row: ir.Value,
    vector: int,
    side: ir.Value,
    block: ir.Value,
    scale: ir.Value | None,
) -> ir.Value:
    """What the sums of a row mean, in float32."""
    at = builder.add(builder.mul(row, i64(_VECTORS)), i64(vector))
    total = load(builder, sums, kind.sums, at, 64)
    if scale is None:
        return total
    of_block = element_at(
        builder, builder.inttoptr(side, PTR), builder.mul(block, i64(2 * BLOCK)), I32
    )
    each = load(builder, of_block, _SUMS, vector, 4)
    excess = load(builder, of_block, _BITS, _VECTORS + vector, 4)
    exact = builder.sitofp(builder.sub(total, excess), _SUMS)
    return builder.fmul(exact, builder.fmul(each, scale))


def _define_sum(module: ir.Module, name: str, dtype: ir.Type) -> None:
    function = declare(module, name, *(I64, I64, PTR, I64), *(PTR, PTR, PTR), *(PTR, I64))
    first, stop, y, stride, places, weights, offsets, out, blocks = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    fma = intrinsic(module, "llvm.fma.v16f32", _SUMS, _SUMS, _SUMS, _SUMS)
    with loop(builder, stop, start=first) as (row, _, _):
        start, end = (
            load(builder, element_at(builder, offsets, row, I64), I64, at) for at in (0, 1)
        )
        with loop(builder, blocks) as (block, _, _):
            zeros = [ir.Constant(_SUMS, None)] * _VECTORS
            with loop(builder, end, zeros, start=start) as (pair, before, after):
                place = load(builder, places, I64, pair)
                weight = splat(builder, load(builder, weights, F32, pair, 4), _SUMS)
                at = _outputs_at(builder, y, stride, place, block, dtype)
                for vector, total in enumerate(before):
                    value = _load_vector(builder, at, vector, dtype)
                    after.append(builder.call(fma, [weight, value, total]))
            at = _outputs_at(builder, out, stride, row, block, dtype)
            for vector, total in enumerate(before):
                _store(builder, total, at, vector, dtype)
    builder.ret_void()


def _define_round(module: ir.Module, name: str, dtype: ir.Type) -> None:
    function = declare(module, name, *(I64, I64, PTR, I64), *(I64, PTR, I64, PTR))
    first, stop, x, stride, blocks, out, out_stride, scales = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    # Unlike maxnum, maximum gives NaN where there is one.
    maximum = intrinsic(module, "llvm.maximum.v16f32", _SUMS, _SUMS, _SUMS)
    largest_of = intrinsic(module, "llvm.vector.reduce.fmaximum.v16f32", F32, _SUMS)
    absolute = intrinsic(module, "llvm.fabs.v16f32", _SUMS, _SUMS)
    fma = intrinsic(module, "llvm.fma.v16f32", _SUMS, _SUMS, _SUMS, _SUMS)
    with loop(builder, stop, start=first) as (row, _, _):
        zeros = [ir.Constant(_SUMS, None)] * _VECTORS
        with loop(builder, blocks, zeros) as (block, before, after):
            at = _outputs_at(builder, x, stride, row, block, dtype)
            for vector, largest in enumerate(before):
                size = builder.call(absolute, [_load_vector(builder, at, vector, dtype)])
                after.append(builder.call(maximum, [largest, size]))
        one, two, three, four = before
        halves = builder.call(maximum, [one, two]), builder.call(maximum, [three, four])
        largest = builder.call(largest_of, [builder.call(maximum, halves)])
        # A row of zeros stays one, whatever it is divided by; NaN stays, too.
        tiny = constant(F32, _SMALLEST_ROW)
        largest = builder.select(builder.fcmp_ordered("<", largest, tiny), tiny, largest)
        scale = builder.fdiv(largest, constant(F32, _LARGEST_BYTE))
        builder.store(scale, element_at(builder, scales, row, F32), align=4)
        factor = splat(builder, builder.fdiv(constant(F32, _LARGEST_BYTE), largest), _SUMS)
        with loop(builder, blocks) as (block, _, _):
            at = _outputs_at(builder, x, stride, row, block, dtype)
            out_at = _outputs_at(builder, out, out_stride, row, block, I8)
            for vector in range(_VECTORS):
                value = _load_vector(builder, at, vector, dtype)
                shifted = builder.call(fma, [value, factor, constant(_SUMS, _ZERO_BYTE + 0.5)])
                bits = builder.fptoui(shifted, _BITS)
                _store(builder, bits, out_at, vector, I8)
    builder.ret_void()


# What the functions above are made of.


@contextmanager
def _panels(
    builder: ir.IRBuilder, jobs: ir.Value, count: ir.Value
) -> Iterator[tuple[dict[str, ir.Value], ir.Value, ir.Value, ir.Value]]:
    """For every job, each of its blocks, and rows as many as `_PANEL` at a time: the job's fields,
    the block's number, the first row's place and how many they are."""
    with loop(builder, count) as (number, _, _):
        start = element_at(builder, jobs, builder.mul(number, i64(len(Job._fields))), I64)
        job = {name: load(builder, start, I64, at) for at, name in enumerate(Job._fields)}
        with (
            loop(builder, job["stop"], start=job["first"]) as (block, _, _),
            loop(builder, job["rows"], step=_PANEL) as (done, _, _),
        ):
            rows = least(builder, builder.sub(job["rows"], done), _PANEL)
            yield job, block, builder.add(job["place"], done), rows


def _block_of(
    builder: ir.IRBuilder, matrix: ir.Value, block: ir.Value, groups: ir.Value
) -> ir.Value:
    """The address of a block of a matrix."""
    start = builder.mul(builder.mul(block, groups), i64(BLOCK))
    return element_at(builder, builder.inttoptr(matrix, PTR), start, I32)


def _outputs_at(
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


def _store(
    builder: ir.IRBuilder, value: ir.Value, base: ir.Value, vector: int, dtype: ir.Type
) -> None:
    if dtype == BF16:
        value = builder.fptrunc(value, ir.VectorType(dtype, _LANES))
    elif dtype == I8:
        value = builder.trunc(value, ir.VectorType(dtype, _LANES))
    builder.store(value, element_at(builder, base, i64(vector * _LANES), dtype), align=1)


def _load_vector(builder: ir.IRBuilder, base: ir.Value, vector: int, dtype: ir.Type) -> ir.Value:
    at = element_at(builder, base, i64(vector * _LANES), dtype)
    value = builder.load(at, typ=ir.VectorType(dtype, _LANES), align=2)
    return value if dtype == F32 else builder.fpext(value, _SUMS)


def _allocate_sums(builder: ir.IRBuilder) -> ir.Value:
    """[_PANEL, 64] on the stack."""
    sums = builder.alloca(_SUMS, _PANEL * _VECTORS)
    sums.align = 64
    return sums


def _silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x / (1 + exp(-x))."""
    one = constant(_SUMS, 1.0)
    return builder.fdiv(x, builder.fadd(one, _exp(builder, builder.fneg(x))))


_LARGEST_BYTE, _ZERO_BYTE = 127.0, 128.0
#: 127 divided by it is a float32.
_SMALLEST_ROW = 2.0**-119
#: exp(r) for |r| <= ln(2) / 2, by Taylor: the first term left out is below 1.2e-7, an ulp.
_EXP = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0]
_LOG2_E = 1.4426950408889634
#: ln(2) in two parts: n times the first is exact in float32 for every n that occurs.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
#: Beyond, exp is infinite, or below the numbers that float32 has in full precision.
_EXP_MOST, _EXP_LEAST = 88.0, -87.0


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) = 2^n exp(r), x = n ln(2) + r. For less than -87 the value there, and one for NaN."""

    def call(name: str, *values: ir.Value) -> ir.Value:
        kinds = [_SUMS] * len(values)
        return builder.call(intrinsic(builder.module, f"llvm.{name}.v16f32", _SUMS, *kinds), values)

    def number(value: float) -> ir.Constant:
        return constant(_SUMS, value)

    is_infinite = builder.fcmp_ordered(">", x, number(_EXP_MOST))
    x = call("maxnum", call("minnum", x, number(_EXP_MOST)), number(_EXP_LEAST))
    n = call("roundeven", builder.fmul(x, number(_LOG2_E)))
    r = call("fma", n, number(-_LN2_HIGH), x)
    r = call("fma", n, number(-_LN2_LOW), r)
    value = number(_EXP[0])
    for factor in _EXP[1:]:
        value = call("fma", value, r, number(factor))
    exponent = builder.shl(builder.fptosi(n, _BITS), constant(_BITS, 23))
    power = builder.bitcast(builder.add(builder.bitcast(value, _BITS), exponent), _SUMS)
    return builder.select(is_infinite, number(math.inf), power)
