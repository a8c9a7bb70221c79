"""The protobuf wire format, as far as the data plane needs it.

Every reader raises `InvalidRequestError` and nothing else, whatever the bytes are.
Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from expertmesh.errors import InvalidRequestError

Buffer = bytes | memoryview  # what was received
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_UINT64 = (1 << 64) - 1
_SMALL = tuple(bytes((value,)) for value in range(128))


def varint(value: int) -> bytes:
    """Base-128 encoding of an unsigned 64-bit value; negatives as two's complement."""
    if 0 <= value < 128:
        return _SMALL[value]
    if 0 < value < 1 << 14:
        return bytes((value & 127 | 128, value >> 7))
    value &= _UINT64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field_varint(number: int, value: int) -> bytes:
    """One integer, enum or bool field; nothing for the default value, as proto3 has it."""
    return varint(number << 3) + varint(value) if value else b""


def field_double(number: int, value: float) -> bytes:
    """One double field; nothing for 0.0."""
    return varint(number << 3 | FIXED64) + struct.pack("<d", value) if value else b""


def field_text(number: int, value: str) -> bytes:
    """One string field; nothing for an empty one."""
    return field_bytes(number, value.encode()) if value else b""


def field_bytes(number: int, value: bytes) -> bytes:
    """One length-delimited field, present even when empty (a message without fields)."""
    return varint(number << 3 | BYTES) + varint(len(value)) + value


def length_prefix(number: int, length: int) -> bytes:
    """What stands before a length-delimited field's bytes."""
    return varint(number << 3 | BYTES) + varint(length)


def read_varint(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    """(value, position after it)."""
    if at < end and buffer[at] < 128:
        return buffer[at], at + 1
    value = shift = 0
    while at < end:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value > _UINT64:
                break
            return value, at
        shift += 7
        if shift > 63:
            break
    raise InvalidRequestError("the message ends inside a number, or the number is over 64 bits")


def fields(buffer: Buffer, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Walks one message: (field number, wire type, value or start, end).

    For VARINT and the fixed types the third item is the value (fixed ones as raw bits); for BYTES
    the third and fourth are the span in `buffer`.
    """
    while at < end:
        tag = buffer[at]
        if tag < 128:  # almost always: a call less for each field
            at += 1
        else:
            tag, at = read_varint(buffer, at, end)
        number, kind = tag >> 3, tag & 7
        if number == 0:
            raise InvalidRequestError("the message has a field number 0: it is not protobuf")
        if kind in (VARINT, BYTES):
            if at < end and buffer[at] < 128:
                length = buffer[at]
                at += 1
            else:
                length, at = read_varint(buffer, at, end)
            if kind == VARINT:
                yield number, kind, length, at
                continue
        elif kind == FIXED64:
            length = 8
        elif kind == FIXED32:
            length = 4
        else:
            raise InvalidRequestError(f"field {number} has wire type {kind}: it is not protobuf")
        if length > end - at:
            raise InvalidRequestError(
                f"field {number} wants {length} bytes but {end - at} are left: the message is cut"
            )
        if kind == BYTES:
            yield number, kind, at, at + length
        else:
            yield number, kind, int.from_bytes(buffer[at : at + length], "little"), at + length
        at += length


def expect(kind: int, wanted: int, name: str) -> None:
    """Refuses a field that came with another wire type than the contract's."""
    if kind != wanted:
        raise InvalidRequestError(f"{name} has wire type {kind}, expected {wanted}", field=name)


def signed(value: int, bits: int = 64) -> int:
    """A varint read as int64 (or int32, which travels sign-extended)."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def double(bits: int) -> float:
    """The float64 of these raw bits."""
    value: float = struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    return value


def text(buffer: Buffer, at: int, end: int, name: str) -> str:
    """A UTF-8 string field."""
    try:
        return bytes(buffer[at:end]).decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{name} is not valid UTF-8", field=name) from None
