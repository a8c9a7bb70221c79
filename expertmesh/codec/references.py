"""References to hidden states in shared memory: message `SharedBlocks` of tensor.proto."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from expertmesh.codec import wire
from expertmesh.codec.wire import Buffer
from expertmesh.errors import InvalidRequestError

#: Blocks begin at multiples of this: a cache line, and every element type's size.
ALIGNMENT = 64
#: Blocks as encoders write and decoders find them: memory that is free again is lent again.
_REMEMBERED = 1024


class Blocks(NamedTuple):
    """What one frame lends: its hidden states, and room for the answer's. In bytes."""

    offset: int
    length: int
    answer_offset: int = 0
    answer_length: int = 0

    def encode(self) -> bytes:
        """The message's fields."""
        return _encode(self)

    @classmethod
    def decode(cls, buffer: Buffer, at: int, end: int) -> Blocks:
        """Reads buffer[at:end]. Raises InvalidRequestError, nothing else."""
        return _decode(bytes(buffer[at:end]))

    def check(self, needed: int, low: int, high: int) -> None:
        """Raises InvalidRequestError unless both blocks lie within low .. high - 1, aligned, and
        the first is as long as the hidden states, `needed` bytes."""
        if self.length != needed:
            raise InvalidRequestError(
                f"blocks.length is {self.length} but the hidden states have {needed} bytes",
                field="blocks.length",
            )
        spans = {
            "offset": (self.offset, self.length),
            "answer_offset": (self.answer_offset, self.answer_length),
        }
        for name, (offset, length) in spans.items():
            if not length:
                continue
            if offset % ALIGNMENT:
                raise InvalidRequestError(
                    f"blocks.{name} is {offset}, expected a multiple of {ALIGNMENT}",
                    field=f"blocks.{name}",
                )
            if offset < low or offset + length > high:
                raise InvalidRequestError(
                    f"blocks.{name} {offset} with {length} bytes is outside of the shared memory, "
                    f"{low} to {high}",
                    field=f"blocks.{name}",
                )


@lru_cache(_REMEMBERED)
def _encode(blocks: Blocks) -> bytes:
    return b"".join(wire.field_varint(number, value) for number, value in enumerate(blocks, 1))


@lru_cache(_REMEMBERED)
def _decode(message: bytes) -> Blocks:
    numbers = {1: 0, 2: 0, 3: 0, 4: 0}
    for number, kind, value, _ in wire.fields(message, 0, len(message)):
        if number in numbers:
            wire.expect(kind, wire.VARINT, "blocks")
            numbers[number] = value
    return Blocks(*numbers.values())
