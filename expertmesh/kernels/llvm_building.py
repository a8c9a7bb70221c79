"""Types, loops and addresses for code that is built with llvmlite.

Addresses are untyped pointers, numbers i64; an index is in elements of the type that it is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir


class _BFloat(ir.Type):  # type: ignore[misc]
    """llvmlite has no name for bfloat16; LLVM has."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I8, I32, I64, F32, BF16 = (
    ir.IntType(8),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
    _BFloat(),
)
PTR = ir.PointerType()


@contextmanager
def loop(
    builder: ir.IRBuilder,
    stop: ir.Value,
    carried: Sequence[ir.Value] = (),
    *,
    start: ir.Value | None = None,
    step: int = 1,
) -> Iterator[tuple[ir.Value, list[ir.Value], list[ir.Value]]]:
    """While index < stop: the index, the carried values, and a list for their next values.

    `carried` are the values at first; those that the loop gave are theirs after it.
    """
    start = i64(0) if start is None else start
    before = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(start, before)
    values = [builder.phi(value.type) for value in carried]
    for value, first in zip(values, carried, strict=True):
        value.add_incoming(first, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, done)
    builder.position_at_end(body)
    after: list[ir.Value] = []
    yield index, values, after
    for value, following in zip(values, after, strict=True):
        value.add_incoming(following, builder.block)
    index.add_incoming(builder.add(index, i64(step)), builder.block)
    builder.branch(head)
    builder.position_at_end(done)


def declare(module: ir.Module, name: str, *parameters: ir.Type) -> ir.Function:
    return ir.Function(module, ir.FunctionType(ir.VoidType(), parameters), name)


def intrinsic(module: ir.Module, name: str, result: ir.Type, *parameters: ir.Type) -> ir.Function:
    known: ir.Function | None = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(result, parameters), name)


def least(builder: ir.IRBuilder, value: ir.Value, most: int) -> ir.Value:
    return builder.select(builder.icmp_signed("<", value, i64(most)), value, i64(most))


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def constant(kind: ir.Type, value: float) -> ir.Constant:
    """A number, in every lane of a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def splat(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType) -> ir.Value:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    order = ir.Constant(ir.VectorType(I32, kind.count), None)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), order)


def element_at(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    """The address of the element `index` of a type."""
    return builder.gep(base, [index], source_etype=kind)


def load(
    builder: ir.IRBuilder, base: ir.Value, kind: ir.Type, index: int | ir.Value, align: int = 8
) -> ir.Value:
    at = i64(index) if isinstance(index, int) else index
    return builder.load(element_at(builder, base, at, kind), typ=kind, align=align)
