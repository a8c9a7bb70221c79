"""The messages of a stream: ForwardStream and ExecuteStream, which are framed alike.

A frame is one request or one answer. It starts with a message that carries everything but,
perhaps, the later part of its hidden states, which follow in chunks of about 1 MiB: the size at
which gRPC in Python moves the most bytes a second (64 MiB as 1 MiB chunks 1.47 GB/s, as one
message 0.62, notes of the design).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from expertmesh.codec import tensors, wire
from expertmesh.codec.messages import Codec, M
from expertmesh.codec.references import Blocks
from expertmesh.codec.wire import Buffer
from expertmesh.errors import InvalidRequestError, MeshError, from_wire

CHUNK_BYTES = 1 << 20
#: Up to this a message is joined at once: that costs less than to hand its parts over one by one.
_JOINED_BYTES = 16 << 10
Parts = tuple[Buffer, ...]
Message = bytes | Parts  # one message of a stream; whoever writes it joins its parts, or does not
_CHUNK_HEAD = 33  # bytes before the elements, at the most: three tags and three numbers
_MAX_RETRY_AFTER_S = 3600.0
_FRAME_ID, _START, _CHUNK, _END, _TIMEOUT_US, _TRACEPARENT = 1, 2, 3, 4, 5, 6
_BLOCKS, _RETURNED, _SHARED = 7, 8, 9
_TAKES_CREDIT = _CREDIT = 10  # of a request; of an answer


@dataclass(slots=True)
class Start:
    """The first message of a frame; the body is buffer[at:end], for a `Codec` to decode."""

    frame_id: int
    at: int
    end: int
    timeout_us: int
    traceparent: str
    blocks: Blocks | None = None  # of a request whose hidden states lie in shared memory
    shared: bool = False  # an answer whose hidden states do
    takes_credit: bool = False


@dataclass(slots=True)
class Chunk:
    """More of a frame's hidden states: buffer[at:end]."""

    frame_id: int
    at: int
    end: int


@dataclass(slots=True)
class End:
    """CancelFrame from a client, FrameError from a server: buffer[at:end]."""

    frame_id: int
    at: int
    end: int


@dataclass(slots=True)
class Returned:
    """FrameReturned from a server: the frame's blocks are the caller's again."""

    frame_id: int
    at: int
    end: int


@dataclass(slots=True)
class Credit:
    """FrameCredit from a server: what the stream may have in flight."""

    frame_id: int
    frames: int
    bytes: int


def joined(message: Message) -> bytes:
    """The message in one piece, as gRPC takes it."""
    return message if isinstance(message, bytes) else b"".join(message)


def encode(
    codec: Codec[M],
    message: M,
    frame_id: int,
    timeout_us: int = 0,
    traceparent: str = "",
    takes_credit: bool = False,
) -> Iterator[Message]:
    """The stream messages of one frame, in order: a start, then chunks while elements are left.

    What is not short comes in parts, of which the elements are a view of the tensor's. The start is
    made at once, so that what cannot be encoded fails here; chunks as they are taken.
    """
    data = tensors.payload(message.hidden_states)
    if len(data) > _JOINED_BYTES and tensors.is_part(message.hidden_states):
        data = memoryview(bytes(data))  # else, while it waits, it would keep the whole
    first = min(len(data), CHUNK_BYTES)
    head, tail = codec.encode(message, first)
    identity = wire.field_varint(_FRAME_ID, frame_id)
    before = identity + wire.length_prefix(_START, len(head) + first + len(tail)) + head
    after = tail
    if timeout_us:
        after += wire.field_varint(_TIMEOUT_US, timeout_us)
    if traceparent:
        after += wire.field_text(_TRACEPARENT, traceparent)
    if takes_credit:
        after += wire.field_varint(_TAKES_CREDIT, takes_credit)
    if first <= _JOINED_BYTES:
        return iter((b"".join((before, data, after)),))
    if first == len(data):
        return iter(((before, data, after),))
    return chain(((before, data[:first], after),), _chunks(identity, data))


def encode_by_reference(
    codec: Codec[M],
    message: M,
    frame_id: int,
    timeout_us: int = 0,
    traceparent: str = "",
    *,
    blocks: Blocks | None = None,
    takes_credit: bool = False,
) -> bytes:
    """The one stream message of a frame whose hidden states lie in shared memory.

    With `blocks` it is a request, without it is an answer to one.
    """
    head, tail = codec.encode(message, 0)
    return b"".join(
        (
            wire.field_varint(_FRAME_ID, frame_id),
            wire.length_prefix(_START, len(head) + len(tail)),
            head,
            tail,
            wire.field_varint(_TIMEOUT_US, timeout_us),
            wire.field_text(_TRACEPARENT, traceparent),
            wire.field_bytes(_BLOCKS, blocks.encode()) if blocks is not None else b"",
            wire.field_varint(_SHARED, blocks is None),
            wire.field_varint(_TAKES_CREDIT, takes_credit),
        )
    )


def _chunks(identity: bytes, data: memoryview) -> Iterator[Parts]:
    for at in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
        part = data[at : at + CHUNK_BYTES]
        chunk = wire.length_prefix(1, len(part))
        yield identity + wire.length_prefix(_CHUNK, len(chunk) + len(part)) + chunk, part


def encode_cancel(frame_id: int) -> bytes:
    """The message that gives a frame up."""
    return wire.field_varint(_FRAME_ID, frame_id) + wire.field_bytes(_END, b"")


def encode_returned(frame_id: int) -> bytes:
    """The message that gives a frame's blocks back."""
    return wire.field_varint(_FRAME_ID, frame_id) + wire.field_bytes(_RETURNED, b"")


def encode_credit(frames: int, bytes_: int) -> bytes:
    """The message that says what a stream may have in flight."""
    return wire.field_bytes(_CREDIT, wire.field_varint(1, frames) + wire.field_varint(2, bytes_))


def encode_error(frame_id: int, error: MeshError) -> bytes:
    """The message that says why a frame failed."""
    body = b"".join(
        (
            wire.field_varint(1, error.code.value[0]),
            wire.field_text(2, error.reason),
            wire.field_text(3, error.message),
            wire.field_text(4, error.field),
            wire.field_double(5, error.retry_after_s),
        )
    )
    return wire.field_varint(_FRAME_ID, frame_id) + wire.field_bytes(_END, body)


def decode(buffer: Buffer) -> Start | Chunk | End | Returned | Credit:
    """One stream message. Raises InvalidRequestError, nothing else."""
    frame_id = timeout_us = kind_seen = at = end = shared = 0
    traceparent, takes_credit = "", False
    blocks = None
    for number, kind, value, upto in wire.fields(buffer, 0, len(buffer)):
        if number == _FRAME_ID:
            wire.expect(kind, wire.VARINT, "frame_id")
            frame_id = value
        elif number in (_START, _CHUNK, _END, _RETURNED):
            wire.expect(kind, wire.BYTES, "kind")
            kind_seen, at, end = number, value, upto
        elif number == _TIMEOUT_US:
            wire.expect(kind, wire.VARINT, "timeout_us")
            timeout_us = value
        elif number == _TRACEPARENT:
            wire.expect(kind, wire.BYTES, "traceparent")
            traceparent = wire.text(buffer, value, upto, "traceparent")
        elif number == _BLOCKS:
            wire.expect(kind, wire.BYTES, "blocks")
            blocks = Blocks.decode(buffer, value, upto)
        elif number == _SHARED:
            wire.expect(kind, wire.VARINT, "shared")
            shared = value
        elif number == _CREDIT and kind == wire.BYTES:
            kind_seen, at, end = number, value, upto
        elif number == _TAKES_CREDIT:
            wire.expect(kind, wire.VARINT, "takes_credit")
            takes_credit = bool(value)
    if kind_seen == _START:
        return Start(frame_id, at, end, timeout_us, traceparent, blocks, bool(shared), takes_credit)
    if kind_seen == _CHUNK:
        return Chunk(frame_id, *_chunk_data(buffer, at, end))
    if kind_seen == _END:
        return End(frame_id, at, end)
    if kind_seen == _RETURNED:
        return Returned(frame_id, at, end)
    if kind_seen == _CREDIT:
        return Credit(frame_id, *_credit(buffer, at, end))
    raise InvalidRequestError("the stream message names no kind: expected a start, chunk or end")


def chunk_at(head: memoryview, length: int) -> Chunk | None:
    """Where the elements lie in a chunk of `length` bytes of which only the first are here.

    None for what is no chunk, has too little of it here, or is laid out as no encoder does it:
    `decode` the whole message then.
    """
    if len(head) < _CHUNK_HEAD or head[0] != _FRAME_ID << 3:
        return None
    try:
        frame_id, at = wire.read_varint(head, 1, len(head))
        if head[at] != _CHUNK << 3 | wire.BYTES:
            return None
        inside, at = wire.read_varint(head, at + 1, len(head))
        end = at + inside
        if head[at] != 1 << 3 | wire.BYTES:
            return None
        size, at = wire.read_varint(head, at + 1, len(head))
    except InvalidRequestError:
        return None
    return Chunk(frame_id, at, at + size) if at + size == end == length else None


def _credit(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    granted = {1: 0, 2: 0}
    for number, kind, value, _ in wire.fields(buffer, at, end):
        if number in granted:
            wire.expect(kind, wire.VARINT, "credit")
            granted[number] = value
    return granted[1], granted[2]


def _chunk_data(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    start = stop = at
    for number, kind, value, upto in wire.fields(buffer, at, end):
        if number == 1:
            wire.expect(kind, wire.BYTES, "chunk.data")
            start, stop = value, upto
    return start, stop


def decode_error(buffer: Buffer, at: int, end: int) -> MeshError:
    """The error of an `End` that a server sent. Raises InvalidRequestError."""
    code, texts, retry_after_s = 0, {2: "", 3: "", 4: ""}, 0.0
    for number, kind, value, upto in wire.fields(buffer, at, end):
        if number == 1:
            wire.expect(kind, wire.VARINT, "error.code")
            code = wire.signed(value, 32)
        elif number in texts:
            wire.expect(kind, wire.BYTES, "error")
            texts[number] = wire.text(buffer, value, upto, "error")
        elif number == 5:
            wire.expect(kind, wire.FIXED64, "error.retry_after_s")
            # Waited for as it is, and sent on: neither takes NaN, infinity or a negative.
            retry_after_s = min(max(0.0, wire.double(value)), _MAX_RETRY_AFTER_S)
    return from_wire(code, texts[2], texts[3], texts[4], retry_after_s)
