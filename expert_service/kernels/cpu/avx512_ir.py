"""Generates LLVM code for AVX-512: what experts are computed with.

All functions take whole jobs (`BlockProduct`); addresses and numbers are i64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from expert_service.kernels.cpu.block_product import BlockProduct
from expertmesh.kernels.avx512_products import (
    BITS,
    PANEL,
    SUMS,
    VECTORS,
    Kind,
    allocate_sums,
    block_of,
    define_product,
    dot_bytes,
    dot_pairs,
    dot_widened,
    exp,
    load_vector,
    outputs_at,
    store,
)
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

    `has_dot`: the CPU has AVX-512 BF16, which multiplies pairs of bfloat16 and rounds to it; else
    they are widened, and rounded in bits.
    """
    module = ir.Module("experts")
    if weights == "int8":
        kind = Kind(dot_bytes, I8, BITS, F32, has_dot)
    else:
        kind = Kind(dot_pairs if has_dot else dot_widened, BF16, SUMS, BF16, has_dot)
    product = define_product(module, kind)
    _define_gate_up(module, product, kind)
    for name, dtype in _DTYPES.items():
        _define_down(module, product, kind, f"down_{name}", dtype)
        _define_sum(module, f"sum_{name}", dtype, has_dot)
        _define_round(module, f"round_{name}", dtype)
    return str(module)


_DTYPES = {"bf16": BF16, "f32": F32}


def _define_gate_up(module: ir.Module, product: ir.Function, kind: Kind) -> None:
    function = declare(module, "gate_up", *(PTR, I64, PTR, I64), *(PTR, PTR, PTR, I64))
    jobs, count, x, stride, rows_at, scales, h, h_stride = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    gates, ups = (allocate_sums(builder) for _ in range(2))
    with _panels(builder, jobs, count) as (job, block, place, rows):
        row = element_at(builder, rows_at, place, I64)
        for matrix, sums in (("matrix", gates), ("second", ups)):
            address = block_of(builder, job[matrix], block, job["groups"])
            builder.call(product, [x, stride, row, rows, address, job["groups"], sums])
        with loop(builder, rows) as (r, _, _):
            out = outputs_at(builder, h, h_stride, builder.add(place, r), block, kind.wide)
            scale = _row_scale(builder, kind, scales, row, r)
            for vector in range(VECTORS):
                gate, up = (
                    _meant(builder, kind, sums, r, vector, job[side], block, scale)
                    for sums, side in ((gates, "side"), (ups, "second_side"))
                )
                value = builder.fmul(_silu(builder, gate), up)
                store(builder, value, out, vector, kind.wide, has_dot=kind.has_dot)
    builder.ret_void()


def _define_down(
    module: ir.Module, product: ir.Function, kind: Kind, name: str, dtype: ir.Type
) -> None:
    function = declare(module, name, *(PTR, I64, PTR, I64), *(PTR, PTR, PTR, I64))
    jobs, count, h, stride, rows_at, scales, y, y_stride = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    sums = allocate_sums(builder)
    with _panels(builder, jobs, count) as (job, block, place, rows):
        row = element_at(builder, rows_at, place, I64)
        address = block_of(builder, job["matrix"], block, job["groups"])
        builder.call(product, [h, stride, row, rows, address, job["groups"], sums])
        with loop(builder, rows) as (r, _, _):
            out = outputs_at(builder, y, y_stride, builder.add(place, r), block, dtype)
            scale = _row_scale(builder, kind, scales, row, r)
            for vector in range(VECTORS):
                value = _meant(builder, kind, sums, r, vector, job["side"], block, scale)
                store(builder, value, out, vector, dtype, has_dot=kind.has_dot)
    builder.ret_void()


def _row_scale(
    builder: ir.IRBuilder, kind: Kind, scales: ir.Value, row: ir.Value, r: ir.Value
) -> ir.Value | None:
    """The scale of the row `row[r]`, in every lane; None where rows have none."""
    if kind.sums != BITS:
        return None
    index = load(builder, row, I64, r)
    return splat(builder, load(builder, scales, F32, index, 4), SUMS)


def _meant(
    builder: ir.IRBuilder,
    kind: Kind,
    sums: ir.Value,
    row: ir.Value,
    vector: int,
    side: ir.Value,
    block: ir.Value,
    scale: ir.Value | None,
) -> ir.Value:
    """What the sums of a row mean, in float32."""
    at = builder.add(builder.mul(row, i64(VECTORS)), i64(vector))
    total = load(builder, sums, kind.sums, at, 64)
    if scale is None:
        return total
    of_block = element_at(
        builder, builder.inttoptr(side, PTR), builder.mul(block, i64(2 * BLOCK)), I32
    )
    each = load(builder, of_block, SUMS, vector, 4)
    excess = load(builder, of_block, BITS, VECTORS + vector, 4)
    exact = builder.sitofp(builder.sub(total, excess), SUMS)
    return builder.fmul(exact, builder.fmul(each, scale))


def _define_sum(module: ir.Module, name: str, dtype: ir.Type, has_dot: bool) -> None:
    function = declare(module, name, *(I64, I64, PTR, I64), *(PTR, PTR, PTR), *(PTR, I64))
    first, stop, y, stride, places, weights, offsets, out, blocks = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    fma = intrinsic(module, "llvm.fma.v16f32", SUMS, SUMS, SUMS, SUMS)
    with loop(builder, stop, start=first) as (row, _, _):
        start, end = (
            load(builder, element_at(builder, offsets, row, I64), I64, at) for at in (0, 1)
        )
        with loop(builder, blocks) as (block, _, _):
            zeros = [ir.Constant(SUMS, None)] * VECTORS
            with loop(builder, end, zeros, start=start) as (pair, before, after):
                place = load(builder, places, I64, pair)
                weight = splat(builder, load(builder, weights, F32, pair, 4), SUMS)
                at = outputs_at(builder, y, stride, place, block, dtype)
                for vector, total in enumerate(before):
                    value = load_vector(builder, at, vector, dtype)
                    after.append(builder.call(fma, [weight, value, total]))
            at = outputs_at(builder, out, stride, row, block, dtype)
            for vector, total in enumerate(before):
                store(builder, total, at, vector, dtype, has_dot=has_dot)
    builder.ret_void()


def _define_round(module: ir.Module, name: str, dtype: ir.Type) -> None:
    function = declare(module, name, *(I64, I64, PTR, I64), *(I64, PTR, I64, PTR))
    first, stop, x, stride, blocks, out, out_stride, scales = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    # Unlike maxnum, maximum gives NaN where there is one.
    maximum = intrinsic(module, "llvm.maximum.v16f32", SUMS, SUMS, SUMS)
    largest_of = intrinsic(module, "llvm.vector.reduce.fmaximum.v16f32", F32, SUMS)
    absolute = intrinsic(module, "llvm.fabs.v16f32", SUMS, SUMS)
    fma = intrinsic(module, "llvm.fma.v16f32", SUMS, SUMS, SUMS, SUMS)
    with loop(builder, stop, start=first) as (row, _, _):
        zeros = [ir.Constant(SUMS, None)] * VECTORS
        with loop(builder, blocks, zeros) as (block, before, after):
            at = outputs_at(builder, x, stride, row, block, dtype)
            for vector, largest in enumerate(before):
                size = builder.call(absolute, [load_vector(builder, at, vector, dtype)])
                after.append(builder.call(maximum, [largest, size]))
        one, two, three, four = before
        halves = builder.call(maximum, [one, two]), builder.call(maximum, [three, four])
        largest = builder.call(largest_of, [builder.call(maximum, halves)])
        # A row of zeros stays one, whatever it is divided by; NaN stays, too.
        tiny = constant(F32, _SMALLEST_ROW)
        largest = builder.select(builder.fcmp_ordered("<", largest, tiny), tiny, largest)
        scale = builder.fdiv(largest, constant(F32, _LARGEST_BYTE))
        builder.store(scale, element_at(builder, scales, row, F32), align=4)
        factor = splat(builder, builder.fdiv(constant(F32, _LARGEST_BYTE), largest), SUMS)
        with loop(builder, blocks) as (block, _, _):
            at = outputs_at(builder, x, stride, row, block, dtype)
            out_at = outputs_at(builder, out, out_stride, row, block, I8)
            for vector in range(VECTORS):
                value = load_vector(builder, at, vector, dtype)
                shifted = builder.call(fma, [value, factor, constant(SUMS, _ZERO_BYTE + 0.5)])
                bits = builder.fptoui(shifted, BITS)
                store(builder, bits, out_at, vector, I8, has_dot=False)
    builder.ret_void()


# What the functions above are made of.


@contextmanager
def _panels(
    builder: ir.IRBuilder, jobs: ir.Value, count: ir.Value
) -> Iterator[tuple[dict[str, ir.Value], ir.Value, ir.Value, ir.Value]]:
    """For every job, each of its blocks, and rows as many as `PANEL` at a time: the job's fields,
    the block's number, the first row's place and how many they are."""
    with loop(builder, count) as (number, _, _):
        start = element_at(builder, jobs, builder.mul(number, i64(len(BlockProduct._fields))), I64)
        job = {name: load(builder, start, I64, at) for at, name in enumerate(BlockProduct._fields)}
        with (
            loop(builder, job["stop"], start=job["first"]) as (block, _, _),
            loop(builder, job["rows"], step=PANEL) as (done, _, _),
        ):
            rows = least(builder, builder.sub(job["rows"], done), PANEL)
            yield job, block, builder.add(job["place"], done), rows


def _silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x / (1 + exp(-x))."""
    one = constant(SUMS, 1.0)
    return builder.fdiv(x, builder.fadd(one, exp(builder, builder.fneg(x))))


_LARGEST_BYTE, _ZERO_BYTE = 127.0, 128.0
#: 127 divided by it is a float32.
_SMALLEST_ROW = 2.0**-119
