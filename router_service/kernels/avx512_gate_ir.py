"""Generates LLVM code for AVX-512: a gate, from rows to chosen experts and weights.

What it computes is `expertmesh.gating.route`; a spec and a number of experts make a module of their
own, in which every loop over experts is unrolled. Vectors have 16 experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

from llvmlite import ir

from expertmesh.kernels.avx512_products import (
    BITS,
    LANES,
    PANEL,
    SUMS,
    VECTORS,
    Kind,
    allocate_sums,
    block_of,
    define_product,
    dot_pairs,
    exp,
)
from expertmesh.kernels.compiling import BLOCK
from expertmesh.kernels.llvm_building import (
    BF16,
    F32,
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
from expertmesh.model import GateSpec

#: Rows that meet every block of the matrix before the next ones do: in L2, or most of them.
PIECE = 4 * PANEL
#: In place of NaN among scores: chosen last, and two of them have a finite sum.
_NAN = -1e30
_TAKEN = -math.inf
_I16 = ir.IntType(16)


def generate(spec: GateSpec, experts: int) -> str:
    """The module's text.

        route(first, stop, x, stride, rows, matrix, groups, bias, logits, ids, weights)
            for first <= r < stop: logits[r] = matrix @ x[r], and the K experts that it chooses

    x is bfloat16, ids int32 [T, K], logits [T, E] (E the blocks' whole outputs), bias [E] and
    weights [T, K] float32. `rows` has the numbers 0 .. PIECE - 1, int64.
    """
    module = ir.Module("gate")
    product = define_product(module, Kind(dot_pairs, BF16, SUMS, BF16, has_dot=True))
    blocks = -(-experts // BLOCK)
    function = declare(module, "route", *(I64, I64, PTR, I64), *[PTR] * 2, I64, *[PTR] * 4)
    first, stop, x, stride, rows, matrix, groups, bias, logits, ids, weights = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    sums = allocate_sums(builder)
    scores = builder.alloca(SUMS, blocks * VECTORS)
    scores.align = 64
    address = builder.ptrtoint(matrix, I64)
    with loop(builder, stop, start=first, step=PIECE) as (start, _, _):
        count = least(builder, builder.sub(stop, start), PIECE)
        with (
            loop(builder, i64(blocks)) as (block, _, _),
            loop(builder, count, step=PANEL) as (done, _, _),
        ):
            panel = least(builder, builder.sub(count, done), PANEL)
            place = builder.add(start, done)
            x_at = element_at(builder, x, builder.mul(place, stride), BF16)
            block_at = block_of(builder, address, block, groups)
            builder.call(product, [x_at, stride, rows, panel, block_at, groups, sums])
            with loop(builder, panel) as (r, _, _):
                row = builder.mul(builder.add(place, r), i64(blocks))
                out = element_at(
                    builder, logits, builder.mul(builder.add(row, block), i64(BLOCK)), F32
                )
                for vector in range(VECTORS):
                    at = builder.add(builder.mul(r, i64(VECTORS)), i64(vector))
                    value = load(builder, sums, SUMS, at, 64)
                    if not spec.logits_float32:
                        value = _rounded(builder, value)
                    builder.store(value, element_at(builder, out, i64(vector), SUMS), align=4)
        with loop(builder, builder.add(start, count), start=start) as (row, _, _):
            _Choice(builder, spec, experts, scores).choose(
                element_at(builder, logits, builder.mul(row, i64(blocks * BLOCK)), F32),
                bias,
                element_at(builder, ids, builder.mul(row, i64(spec.top_k)), I32),
                element_at(builder, weights, builder.mul(row, i64(spec.top_k)), F32),
            )
    builder.ret_void()
    return str(module)


class _Choice:
    """What one row chooses."""

    def __init__(
        self, builder: ir.IRBuilder, spec: GateSpec, experts: int, scores: ir.Value
    ) -> None:
        """`scores` is room for the row's."""
        self._builder = builder
        self._spec = spec
        self._experts = experts
        self._scores = scores
        self._vectors = -(-experts // BLOCK) * VECTORS

    def choose(self, logits: ir.Value, bias: ir.Value, ids: ir.Value, weights: ir.Value) -> None:
        """Writes ids and weights [K]."""
        builder, spec = self._builder, self._spec
        scores = self._scored(
            [load(builder, logits, SUMS, each, 4) for each in range(self._vectors)]
        )
        choice = []
        for each, score in enumerate(scores):
            builder.store(score, element_at(builder, self._scores, i64(each), SUMS), align=64)
            biased = builder.fadd(score, load(builder, bias, SUMS, each, 4))
            is_number = builder.fcmp_ordered("==", biased, biased)
            choice.append(builder.select(is_number, biased, constant(SUMS, _NAN)))
        if spec.topk_group < spec.n_group:
            choice = self._in_groups(choice)
        choice = [self._padded(each, value, _TAKEN) for each, value in enumerate(choice)]
        picked = []
        for k in range(spec.top_k):
            expert, choice = self._take_largest(choice)
            picked.append(load(builder, self._scores, F32, builder.zext(expert, I64), 4))
            builder.store(expert, element_at(builder, ids, i64(k), I32), align=4)
        for k, weight in enumerate(self._weighed(picked)):
            builder.store(weight, element_at(builder, weights, i64(k), F32), align=4)

    def _scored(self, logits: Sequence[ir.Value]) -> list[ir.Value]:
        """Scores from logits."""
        builder, one = self._builder, constant(SUMS, 1.0)
        if self._spec.score == "sigmoid":
            return [
                builder.fdiv(one, builder.fadd(one, self._exp(builder.fneg(logit))))
                for logit in logits
            ]
        greatest = self._across("fmax", self._joined("maxnum", logits))
        shifted = [builder.fsub(logit, splat(builder, greatest, SUMS)) for logit in logits]
        powers = [self._padded(each, self._exp(value), 0.0) for each, value in enumerate(shifted)]
        total = splat(builder, self._total(reduce(builder.fadd, powers)), SUMS)
        return [builder.fdiv(power, total) for power in powers]

    def _exp(self, x: ir.Value) -> ir.Value:
        """exp(x), NaN for NaN."""
        is_nan = self._builder.fcmp_unordered("uno", x, x)
        return self._builder.select(is_nan, x, exp(self._builder, x))

    def _in_groups(self, choice: Sequence[ir.Value]) -> list[ir.Value]:
        """The same with -inf outside the best groups."""
        builder, spec = self._builder, self._spec
        size = self._experts // spec.n_group // LANES  # vectors
        best = ir.Constant(SUMS, [_TAKEN] * LANES)
        for group in range(spec.n_group):
            score = self._group_score(choice[group * size : (group + 1) * size])
            best = builder.insert_element(best, score, ir.Constant(I32, group))
        kept = ir.Constant(I32, 0)
        for _ in range(spec.topk_group):
            group, (best,) = self._take_largest([best])
            kept = builder.or_(kept, builder.shl(ir.Constant(I32, 1), group))
        masked = []
        for group in range(spec.n_group):
            is_kept = builder.icmp_signed(
                "!=", builder.and_(kept, ir.Constant(I32, 1 << group)), ir.Constant(I32, 0)
            )
            masked += [
                builder.select(is_kept, value, constant(SUMS, _TAKEN))
                for value in choice[group * size : (group + 1) * size]
            ]
        return masked

    def _group_score(self, values: Sequence[ir.Value]) -> ir.Value:
        """The highest value of a group, or the sum of its two highest."""
        builder, high = self._builder, values[0]
        if self._spec.group_score == "max":
            return self._across("fmax", self._joined("maxnum", values))
        low = constant(SUMS, -math.inf)
        for value in values[1:]:
            low = self._call("maxnum", low, self._call("minnum", high, value))
            high = self._call("maxnum", high, value)
        first = self._across("fmax", high)
        where = self._lowest_of(high, first)
        second = builder.select(self._is_lane(0, where), low, high)
        return builder.fadd(first, self._across("fmax", second))

    def _take_largest(self, values: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        """The index (i32) of the largest value, of equals the lowest, and the values without it."""
        builder = self._builder
        largest = splat(builder, self._across("fmax", self._joined("maxnum", values)), SUMS)
        index = ir.Constant(I32, 0)
        for each in reversed(range(len(values))):
            lanes = self._lanes_equal(values[each], largest)
            here = builder.add(self._lowest_bit(lanes), ir.Constant(I32, each * LANES))
            is_here = builder.icmp_signed("!=", lanes, ir.Constant(_I16, 0))
            index = builder.select(is_here, here, index)
        taken = constant(SUMS, _TAKEN)
        left = [
            builder.select(self._is_lane(each, index), taken, value)
            for each, value in enumerate(values)
        ]
        return index, left

    def _weighed(self, picked: Sequence[ir.Value]) -> list[ir.Value]:
        """Weights of the chosen scores."""
        builder, spec, weights = self._builder, self._spec, list(picked)
        if spec.renormalize:
            total = builder.fadd(reduce(builder.fadd, weights), constant(F32, spec.renormalize_eps))
            weights = [builder.fdiv(weight, total) for weight in weights]
        if spec.scale != 1.0:
            weights = [builder.fmul(weight, constant(F32, spec.scale)) for weight in weights]
        if spec.round_weights and not spec.logits_float32:
            weights = [_rounded(builder, weight) for weight in weights]
        return weights

    def _padded(self, vector: int, value: ir.Value, padding: float) -> ir.Value:
        """The vector's value, with `padding` where there is no expert."""
        experts = min(LANES, max(0, self._experts - vector * LANES))
        if experts == LANES:
            return value
        is_expert = ir.Constant(
            ir.VectorType(ir.IntType(1), LANES), [lane < experts for lane in range(LANES)]
        )
        return self._builder.select(is_expert, value, constant(SUMS, padding))

    def _lanes_equal(self, value: ir.Value, other: ir.Value) -> ir.Value:
        """A bit for each lane in which they are equal."""
        equal = self._builder.fcmp_ordered("==", value, other)
        return self._builder.bitcast(equal, _I16)

    def _lowest_of(self, value: ir.Value, wanted: ir.Value) -> ir.Value:
        """The lowest lane that has the wanted number (i32)."""
        return self._lowest_bit(self._lanes_equal(value, splat(self._builder, wanted, SUMS)))

    def _lowest_bit(self, bits: ir.Value) -> ir.Value:
        return self._builder.zext(self._builder.cttz(bits, ir.Constant(ir.IntType(1), 0)), I32)

    def _is_lane(self, vector: int, index: ir.Value) -> ir.Value:
        """Which lane of the vector is the expert of that index, if any is."""
        numbers = ir.Constant(BITS, list(range(vector * LANES, (vector + 1) * LANES)))
        return self._builder.icmp_signed("==", numbers, splat(self._builder, index, BITS))

    def _joined(self, name: str, values: Sequence[ir.Value]) -> ir.Value:
        """An intrinsic of two vectors over all of them."""
        return reduce(lambda one, other: self._call(name, one, other), values)

    def _call(self, name: str, *values: ir.Value) -> ir.Value:
        kinds = [SUMS] * len(values)
        function = intrinsic(self._builder.module, f"llvm.{name}.v16f32", SUMS, *kinds)
        return self._builder.call(function, values)

    def _across(self, name: str, value: ir.Value) -> ir.Value:
        """One number from a vector's lanes."""
        function = intrinsic(self._builder.module, f"llvm.vector.reduce.{name}.v16f32", F32, SUMS)
        return self._builder.call(function, [value])

    def _total(self, value: ir.Value) -> ir.Value:
        """The sum of a vector's lanes."""
        function = intrinsic(self._builder.module, "llvm.vector.reduce.fadd.v16f32", F32, F32, SUMS)
        zero = constant(F32, 0.0)
        return self._builder.call(function, [zero, value], fastmath=("reassoc",))


def _rounded(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Through bfloat16 and back."""
    narrow = BF16 if value.type == F32 else ir.VectorType(BF16, LANES)
    return builder.fpext(builder.fptrunc(value, narrow), value.type)
