"""Whatever the bytes are, a decoder returns a message or raises one of our errors."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.codec import frames, wire
from expertmesh.codec.messages import (
    EXECUTE_REQUEST,
    EXECUTE_RESPONSE,
    FORWARD_REQUEST,
    FORWARD_RESPONSE,
    ExecuteRequest,
    ExecuteResponse,
    ForwardRequest,
    ForwardResponse,
    encode_whole,
)
from expertmesh.codec.references import Blocks
from expertmesh.errors import InvalidRequestError, MeshError, OverloadedError

LIMIT = 1 << 16
CODECS = {
    "ForwardRequest": FORWARD_REQUEST,
    "ForwardResponse": FORWARD_RESPONSE,
    "ExecuteRequest": EXECUTE_REQUEST,
    "ExecuteResponse": EXECUTE_RESPONSE,
}
IDS = torch.tensor([[0, 5], [300, -1]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
PAIRS: dict[str, Any] = {"expert_ids": IDS.numpy(), "expert_weights": WEIGHTS.numpy()}
HIDDEN = torch.arange(12, dtype=torch.bfloat16).view(2, 6)
VALID = [
    encode_whole(
        FORWARD_REQUEST,
        ForwardRequest(
            layer=3,
            hidden_states=HIDDEN,
            expert_ids=IDS,
            expert_weights=WEIGHTS,
            pass_non_finite=True,
            want_detail=True,
        ),
    ),
    encode_whole(
        FORWARD_RESPONSE,
        ForwardResponse(hidden_states=HIDDEN, expert_ids=IDS, expert_weights=WEIGHTS, epoch=300),
    ),
    encode_whole(
        EXECUTE_REQUEST,
        ExecuteRequest(
            layer=3,
            hidden_states=HIDDEN,
            **PAIRS,
            epoch=300,
        ),
    ),
    encode_whole(EXECUTE_RESPONSE, ExecuteResponse(hidden_states=HIDDEN, compute_us=300)),
]
ERROR = OverloadedError("full", field="layer", retry_after_s=0.5)
VALID += [
    *(
        frames.joined(
            next(frames.encode(FORWARD_REQUEST, ForwardRequest(layer=1, hidden_states=HIDDEN), 9))
        ),
        wire.field_varint(1, 9) + wire.field_bytes(3, wire.field_bytes(1, b"abcdef")),
        frames.encode_cancel(1 << 63),
        frames.encode_error(4, ERROR),
        frames.encode_by_reference(
            EXECUTE_REQUEST,
            ExecuteRequest(
                layer=1,
                hidden_states=HIDDEN,
                **PAIRS,
            ),
            9,
            blocks=Blocks(4096, 24, 1 << 40, 24),
        ),
        frames.encode_returned(300),
    )
]


def decode_message(name: str, buffer: bytes) -> None:
    """Decodes and completes a message, by chunks too, and reads every element."""
    pending = CODECS[name].decode(buffer, 0, len(buffer), LIMIT)
    hidden = pending.hidden_states
    assert hidden.total <= LIMIT
    if not hidden.complete:
        with pytest.raises(InvalidRequestError):
            pending.finish()
        missing = bytes(hidden.total - hidden.have)
        hidden.append(missing, 0, len(missing))
        with pytest.raises(InvalidRequestError):
            hidden.append(b"x", 0, 1)
    message = pending.finish()
    for field in message.__slots__:
        if isinstance(value := getattr(message, field), torch.Tensor | np.ndarray):
            assert value.nbytes <= max(LIMIT, len(buffer))


def decode_stream(buffer: bytes) -> None:
    """Decodes a stream message, and its body as everything that it may be."""
    message = frames.decode(buffer)
    assert 0 <= message.at <= message.end <= len(buffer)
    if isinstance(message, frames.Start):
        for codec in CODECS.values():
            ours_only(lambda codec=codec: codec.decode(buffer, message.at, message.end, LIMIT))
    elif isinstance(message, frames.End):
        decode_error(buffer[message.at : message.end])


def decode_blocks(buffer: bytes) -> None:
    """Decodes references; what passes the check lies within the memory."""
    blocks = Blocks.decode(buffer, 0, len(buffer))
    blocks.check(blocks.length, 4096, 1 << 20)
    for offset, length in (
        (blocks.offset, blocks.length),
        (blocks.answer_offset, blocks.answer_length),
    ):
        assert not length or 4096 <= offset <= offset + length <= 1 << 20


def decode_error(buffer: bytes) -> None:
    """Decodes a FrameError, and sends it on."""
    error = frames.decode_error(buffer, 0, len(buffer))
    assert isinstance(error, MeshError)
    frames.encode_error(0, error)


DECODERS: dict[str, Callable[[bytes], None]] = {
    **{name: lambda buffer, name=name: decode_message(name, buffer) for name in CODECS},
    "stream message": decode_stream,
    "FrameError": decode_error,
    "SharedBlocks": decode_blocks,
}


def ours_only(decode: Callable[[], Any]) -> None:
    """Lets InvalidRequestError (MessageTooLargeError is one) pass, and nothing else."""
    try:
        decode()
    except InvalidRequestError:
        return


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid message with some bytes flipped, cut out, inserted or repeated."""
    buffer = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(buffer)))
        kind = draw(st.sampled_from(["flip", "truncate", "insert", "remove", "repeat"]))
        if kind == "flip" and at < len(buffer):
            buffer[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "truncate":
            del buffer[at:]
        elif kind == "insert":
            buffer[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif kind == "remove":
            del buffer[at : at + draw(st.integers(1, 8))]
        elif kind == "repeat":
            buffer[at:at] = buffer[at : at + draw(st.integers(1, 16))]
    return bytes(buffer)


@st.composite
def shaped(draw: st.DrawFn) -> bytes:
    """Well-formed protobuf whose tensors claim any type and any extents."""
    extents = st.one_of(
        st.sampled_from([0, 1, 2, 1 << 16, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, -1]),
        st.integers(-(1 << 63), (1 << 63) - 1),
    )
    shape = draw(st.lists(extents, max_size=10))
    packed = draw(st.booleans())
    body = wire.field_varint(1, draw(st.integers(0, 8)))
    if packed:
        body += wire.field_bytes(2, b"".join(map(wire.varint, shape)))
    else:
        body += b"".join(b"\x10" + wire.varint(extent) for extent in shape)
    body += wire.field_bytes(3, draw(st.binary(max_size=64)))
    return b"".join(wire.field_bytes(number, body) for number in draw(st.permutations([1, 2, 3])))


decoders = pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
settle = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@decoders
@given(buffer=st.binary(max_size=200))
@settle
def test_arbitrary_bytes_are_a_message_or_an_error_of_ours(decode, buffer) -> None:
    ours_only(lambda: decode(buffer))


@decoders
@given(buffer=mutated())
@settle
def test_damaged_messages_are_a_message_or_an_error_of_ours(decode, buffer) -> None:
    ours_only(lambda: decode(buffer))


@decoders
@given(buffer=shaped())
@settle
def test_absurd_shapes_are_a_message_or_an_error_of_ours(decode, buffer) -> None:
    ours_only(lambda: decode(buffer))


@decoders
def test_messages_cut_at_every_byte_are_a_message_or_an_error_of_ours(decode) -> None:
    for buffer in VALID:
        for end in range(len(buffer) + 1):
            ours_only(lambda cut=buffer[:end]: decode(cut))


@given(buffer=st.one_of(mutated(), shaped()))
@settle
def test_hand_decoding_refuses_or_agrees_with_generated_code(buffer) -> None:
    """What ours takes, protobuf takes as well, and reads the same numbers."""
    from google.protobuf.message import DecodeError

    from expertmesh.v1 import router_pb2

    try:
        ours = FORWARD_REQUEST.decode(buffer, 0, len(buffer), LIMIT)
    except InvalidRequestError:
        return
    try:
        generated = router_pb2.ForwardRequest.FromString(buffer)
    except DecodeError as error:
        pytest.fail(f"ours reads {buffer!r}, protobuf says {error}")
    message = ours._message
    assert message.layer == generated.layer
    assert message.include_shared == generated.include_shared
    assert message.want_detail == generated.want_detail


@pytest.mark.slow
def test_decoding_allocates_no_more_than_a_few_times_what_arrived() -> None:
    """Python objects are traced; tensors are bounded by `hidden.total <= LIMIT` above."""
    generator = random.Random(0)
    hostile = [
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        wire.field_bytes(2, b"\x08\x01\x12" + wire.varint(60_000) + b"\x01" * 60_000),
        wire.field_bytes(2, b"\x08\x01" + b"\x10\x01" * 30_000),
        b"\x38\x01" * 30_000,
        b"".join(
            wire.varint(generator.randrange(8, 1 << 20) << 3) + b"\x01" for _ in range(20_000)
        ),
    ]

    tracemalloc.start()
    for buffer in hostile:
        for decode in DECODERS.values():
            ours_only(lambda decode=decode, buffer=buffer: decode(buffer))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * max(map(len, hostile))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_huge_shape_is_refused_before_anything_is_allocated(codec, monkeypatch) -> None:
    number = 2 if codec in (FORWARD_REQUEST, EXECUTE_REQUEST) else 1
    shape = wire.field_bytes(2, wire.varint(LIMIT // 4 + 1))
    buffer = wire.field_bytes(number, wire.field_varint(1, 1) + shape)

    def allocate(*_: object, **__: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(torch, "empty", allocate)
    with pytest.raises(InvalidRequestError, match="over the limit"):
        codec.decode(buffer, 0, len(buffer), LIMIT)
