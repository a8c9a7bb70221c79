"""Hand-written frames and generated code agree, in both directions, byte for byte."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.codec import frames, tensors
from expertmesh.codec.frames import CHUNK_BYTES
from expertmesh.codec.messages import (
    EXECUTE_REQUEST,
    EXECUTE_RESPONSE,
    FORWARD_REQUEST,
    FORWARD_RESPONSE,
    ExecuteRequest,
    ExecuteResponse,
    ForwardRequest,
    ForwardResponse,
    decode_whole,
)
from expertmesh.codec.references import Blocks
from expertmesh.errors import BY_REASON, InternalError, InvalidRequestError, OverloadedError
from expertmesh.v1 import expert_pb2, router_pb2, tensor_pb2
from tests.codec import BIG_ID, IDS, LIMIT, WEIGHTS, as_proto, drawn, same


def sized(nbytes: int) -> torch.Tensor:
    """[T, 1] fp8 of that many bytes, no two rows of 256 alike in their neighbourhood."""
    return (torch.arange(nbytes) % 251).to(torch.uint8).view(torch.float8_e4m3fn).view(nbytes, 1)


def generated_frame(
    message_type: Any, kind: str, body: Any, tensor: torch.Tensor, frame_id: int, **others: Any
) -> list[bytes]:
    """What generated code writes for one frame, cut where ours cuts."""
    data = bytes(tensors.payload(tensor))
    body.hidden_states.CopyFrom(as_proto(tensor, CHUNK_BYTES))
    start = message_type(frame_id=frame_id, **{kind: body}, **others)
    chunks = [
        message_type(
            frame_id=frame_id, chunk=tensor_pb2.TensorChunk(data=data[at : at + CHUNK_BYTES])
        )
        for at in range(CHUNK_BYTES, len(data), CHUNK_BYTES)
    ]
    return [message.SerializeToString() for message in (start, *chunks)]


SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES // 2]


@pytest.mark.parametrize("nbytes", SIZES)
def test_request_frames_are_the_bytes_that_generated_code_writes(nbytes) -> None:
    message = ForwardRequest(layer=2, hidden_states=sized(nbytes), include_shared=True)
    body = router_pb2.ForwardRequest(layer=2, include_shared=True)

    encoded = frames.encode(FORWARD_REQUEST, message, BIG_ID, 1_500_000, "00-ab-cd-01")
    written = [frames.joined(each) for each in encoded]

    assert written == generated_frame(
        router_pb2.ForwardStreamRequest,
        "forward",
        body,
        message.hidden_states,
        BIG_ID,
        timeout_us=1_500_000,
        traceparent="00-ab-cd-01",
    )
    assert len(written) == max(1, -(-nbytes // CHUNK_BYTES))


FRAMED: dict[str, tuple[Any, Any, Any, str, Callable[..., Any]]] = {
    "forward response": (
        FORWARD_RESPONSE,
        ForwardResponse(hidden_states=sized(3 * CHUNK_BYTES), epoch=7),
        router_pb2.ForwardResponse(epoch=7),
        "forward",
        router_pb2.ForwardStreamResponse,
    ),
    "execute request": (
        EXECUTE_REQUEST,
        ExecuteRequest(
            layer=1,
            hidden_states=sized(3 * CHUNK_BYTES),
            expert_ids=IDS.numpy(),
            expert_weights=WEIGHTS.numpy(),
            epoch=7,
        ),
        expert_pb2.ExecuteRequest(
            layer=1, expert_ids=as_proto(IDS), expert_weights=as_proto(WEIGHTS), epoch=7
        ),
        "execute",
        expert_pb2.ExecuteStreamRequest,
    ),
    "execute response": (
        EXECUTE_RESPONSE,
        ExecuteResponse(hidden_states=sized(3 * CHUNK_BYTES), queue_us=9),
        expert_pb2.ExecuteResponse(queue_us=9),
        "execute",
        expert_pb2.ExecuteStreamResponse,
    ),
}


@pytest.mark.parametrize(
    ("codec", "ours", "body", "kind", "message_type"), FRAMED.values(), ids=FRAMED
)
def test_the_other_frames_are_what_generated_code_writes_too(
    codec, ours, body, kind, message_type
) -> None:
    written = [frames.joined(each) for each in frames.encode(codec, ours, 1)]

    assert written == generated_frame(message_type, kind, body, ours.hidden_states, 1)


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_frame_is_put_together_from_its_chunks(nbytes) -> None:
    tensor = sized(nbytes)
    start, *chunks = generated_frame(
        router_pb2.ForwardStreamRequest,
        "forward",
        router_pb2.ForwardRequest(layer=2),
        tensor,
        77,
        timeout_us=5,
        traceparent="t",
    )

    opened = frames.decode(start)
    assert isinstance(opened, frames.Start)
    pending = FORWARD_REQUEST.decode(start, opened.at, opened.end, LIMIT)
    for chunk in chunks:
        assert not pending.hidden_states.complete
        part = frames.decode(chunk)
        assert isinstance(part, frames.Chunk)
        assert part.frame_id == 77
        pending.hidden_states.append(chunk, part.at, part.end)

    assert (opened.frame_id, opened.timeout_us, opened.traceparent) == (77, 5, "t")
    assert same(pending.finish().hidden_states, tensor)


def test_a_frame_cut_anywhere_is_put_together_the_same() -> None:
    tensor = drawn(10, 10)
    data = bytes(tensors.payload(tensor))
    start = router_pb2.ForwardRequest(hidden_states=as_proto(tensor, 3)).SerializeToString()

    pending = FORWARD_REQUEST.decode(start, 0, len(start), LIMIT)
    for cut in (data[3:4], b"", data[4:391], data[391:]):
        pending.hidden_states.append(cut, 0, len(cut))

    assert same(pending.finish().hidden_states, tensor)


def test_a_chunk_beyond_the_shape_is_refused() -> None:
    start = router_pb2.ForwardRequest(hidden_states=as_proto(drawn(2, 2), 8)).SerializeToString()
    pending = FORWARD_REQUEST.decode(start, 0, len(start), LIMIT)

    with pytest.raises(InvalidRequestError, match="chunks bring 17 bytes") as caught:
        pending.hidden_states.append(bytes(9), 0, 9)

    assert caught.value.field == "hidden_states.data"


def test_a_frame_that_misses_elements_cannot_be_finished() -> None:
    start = router_pb2.ForwardRequest(hidden_states=as_proto(drawn(2, 2), 8)).SerializeToString()

    with pytest.raises(InvalidRequestError, match=r"8 bytes but the shape .* needs 16"):
        decode_whole(FORWARD_REQUEST, start, LIMIT)


REFERRED = Blocks(1 << 40, 3 * CHUNK_BYTES, 4096, 3 * CHUNK_BYTES)
AS_PROTO = tensor_pb2.SharedBlocks(
    offset=1 << 40, length=3 * CHUNK_BYTES, answer_offset=4096, answer_length=3 * CHUNK_BYTES
)


@pytest.mark.parametrize(
    ("codec", "ours", "body", "kind", "message_type"), FRAMED.values(), ids=FRAMED
)
def test_frames_in_shared_memory_are_what_generated_code_writes(
    codec, ours, body, kind, message_type
) -> None:
    request = message_type in (router_pb2.ForwardStreamRequest, expert_pb2.ExecuteStreamRequest)
    body.hidden_states.CopyFrom(as_proto(ours.hidden_states, 0))
    start = message_type(frame_id=BIG_ID, **{kind: body})
    if request:
        start.blocks.CopyFrom(AS_PROTO)
        start.timeout_us = 7
    else:
        start.shared = True

    written = frames.encode_by_reference(
        codec, ours, BIG_ID, 7 if request else 0, blocks=REFERRED if request else None
    )

    assert written == start.SerializeToString()
    got = frames.decode(written)
    assert isinstance(got, frames.Start)
    assert (got.blocks, got.shared) == ((REFERRED, False) if request else (None, True))
    assert codec.decode(written, got.at, got.end, LIMIT).hidden_states.have == 0


def test_a_return_of_blocks_is_what_generated_code_writes() -> None:
    buffer = frames.encode_returned(BIG_ID)

    for kind in (router_pb2.ForwardStreamResponse, expert_pb2.ExecuteStreamResponse):
        returned = kind(frame_id=BIG_ID, returned=tensor_pb2.FrameReturned())
        assert buffer == returned.SerializeToString()
    got = frames.decode(buffer)
    assert isinstance(got, frames.Returned)
    assert got.frame_id == BIG_ID


@pytest.mark.parametrize("frame_id", [0, 1, 127, 128, 1 << 32, 1 << 63, BIG_ID])
def test_a_cancellation_is_what_generated_code_writes(frame_id) -> None:
    buffer = frames.encode_cancel(frame_id)

    assert (
        buffer
        == router_pb2.ForwardStreamRequest(
            frame_id=frame_id, cancel=router_pb2.CancelFrame()
        ).SerializeToString()
    )
    assert (
        buffer
        == expert_pb2.ExecuteStreamRequest(
            frame_id=frame_id, cancel=expert_pb2.CancelExecution()
        ).SerializeToString()
    )
    got = frames.decode(buffer)
    assert isinstance(got, frames.End)
    assert got.frame_id == frame_id


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_an_error_is_what_generated_code_writes_and_comes_back_as_itself(reason) -> None:
    kind = BY_REASON[reason]
    error = kind("zu groß", field="layer", retry_after_s=0.05)
    body = tensor_pb2.FrameError(
        code=kind.code.value[0],
        reason=reason,
        message="zu groß",
        field="layer",
        retry_after_s=0.05,
    )

    buffer = frames.encode_error(BIG_ID, error)
    end = frames.decode(buffer)
    assert isinstance(end, frames.End)
    got = frames.decode_error(buffer, end.at, end.end)

    assert (
        buffer == router_pb2.ForwardStreamResponse(frame_id=BIG_ID, error=body).SerializeToString()
    )
    assert type(got) is kind
    assert (got.message, got.field, got.retry_after_s) == ("zu groß", "layer", 0.05)


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), float("-inf"), -1.0, 1e300])
def test_a_delay_that_nobody_can_wait_is_not_believed(hostile) -> None:
    body = tensor_pb2.FrameError(code=8, reason="QUEUE_FULL", retry_after_s=hostile)
    buffer = body.SerializeToString()

    got = frames.decode_error(buffer, 0, len(buffer))

    assert isinstance(got, OverloadedError)
    assert 0.0 <= got.retry_after_s <= 3600.0


def test_a_code_that_grpc_does_not_know_is_an_internal_error() -> None:
    buffer = tensor_pb2.FrameError(code=-5, reason="NEW_ONE", message="m").SerializeToString()

    assert isinstance(frames.decode_error(buffer, 0, len(buffer)), InternalError)


def test_a_stream_message_without_a_kind_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="names no kind"):
        frames.decode(b"\x08\x05")


@pytest.mark.parametrize("rows", [1, 100])
def test_a_message_that_waits_keeps_its_own_rows_and_not_the_whole_batch(rows: int) -> None:
    batch = torch.randn(4096, 64)
    memory = batch.numpy()
    kept = weakref.ref(memory)
    response = ExecuteResponse(hidden_states=torch.from_numpy(memory)[:rows])
    expected = response.hidden_states.clone()
    del batch

    (message,) = frames.encode(EXECUTE_RESPONSE, response, 1)
    del response, memory

    assert kept() is None
    got = expert_pb2.ExecuteStreamResponse.FromString(frames.joined(message))
    data = bytearray(got.execute.hidden_states.data)
    assert torch.equal(torch.frombuffer(data, dtype=torch.float32).view(rows, 64), expected)


@pytest.mark.parametrize("rows", [100, 1000])
def test_the_elements_of_a_whole_tensor_are_not_copied(rows: int) -> None:
    hidden = torch.randn(rows, 64)

    (message,) = frames.encode(EXECUTE_RESPONSE, ExecuteResponse(hidden_states=hidden), 1)

    assert not isinstance(message, bytes)
    _, elements, _ = message
    assert np.frombuffer(elements, np.uint8).ctypes.data == hidden.data_ptr()


def test_a_chunk_is_found_from_its_first_bytes() -> None:
    hidden = torch.randn(3 * CHUNK_BYTES // 256, 64)
    _, *chunks = frames.encode(EXECUTE_RESPONSE, ExecuteResponse(hidden_states=hidden), BIG_ID)
    whole = [frames.joined(each) for each in chunks]

    assert len(whole) == 2
    for message in whole:
        expected = frames.decode(message)
        assert frames.chunk_at(memoryview(message)[:64], len(message)) == expected
        for others in (message[:64] + b"", b"\xff" * 64, bytes(64), message[:20]):
            wrong_length = len(message) + 1
            assert frames.chunk_at(memoryview(others), wrong_length) is None


@given(st.binary(max_size=80), st.integers(0, 1 << 40))
def test_no_first_bytes_make_a_chunk_of_what_is_none(head: bytes, length: int) -> None:
    found = frames.chunk_at(memoryview(head), length)

    assert found is None or found.end == length
