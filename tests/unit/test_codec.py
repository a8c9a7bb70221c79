"""Hand-written bytes and generated code agree, in both directions, byte for byte."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.codec import frames, messages, tensors, wire
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
    encode_whole,
)
from expertmesh.codec.references import Blocks
from expertmesh.codec.tensors import Array
from expertmesh.errors import (
    BY_REASON,
    InternalError,
    InvalidRequestError,
    MessageTooLargeError,
    OverloadedError,
)
from expertmesh.v1 import expert_pb2, router_pb2, tensor_pb2

LIMIT = 64 << 20
BIG_ID = (1 << 64) - 1
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int32,
    torch.int64,
]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 4).to(dtype)


def same(got: torch.Tensor | Array | None, wanted: torch.Tensor | Array | None) -> bool:
    """Equal in dtype, shape and every bit."""
    if got is None or wanted is None:
        return got is wanted
    if isinstance(got, np.ndarray) and isinstance(wanted, np.ndarray):
        return same(torch.from_numpy(got), torch.from_numpy(wanted))
    return (
        got.dtype == wanted.dtype
        and got.shape == wanted.shape
        and bytes(tensors.payload(got)) == bytes(tensors.payload(wanted))
    )


def as_proto(tensor: torch.Tensor, length: int | None = None) -> tensor_pb2.Tensor:
    """The generated message of a tensor, or of its first `length` bytes."""
    data = bytes(tensors.payload(tensor))
    return tensor_pb2.Tensor(
        data_type=tensors.NUMBER_BY_DTYPE[tensor.dtype],  # type: ignore[arg-type]
        shape=list(tensor.shape),
        data=data if length is None else data[:length],
    )


IDS = torch.tensor([[0, 5], [300, -1], [2, 7]], dtype=torch.int32)
WEIGHTS = drawn(3, 2)
FP8, SCALE = drawn(3, 8, dtype=torch.float8_e4m3fn), torch.tensor([0.5, 1.0, 2.0**119])

#: (codec, ours, generated)
PAIRS: dict[str, tuple[Any, Any, Any]] = {
    "forward request, all fields": (
        FORWARD_REQUEST,
        ForwardRequest(
            layer=61,
            hidden_states=drawn(3, 8, dtype=torch.bfloat16),
            expert_ids=IDS,
            expert_weights=WEIGHTS,
            pass_non_finite=True,
            include_shared=True,
            want_detail=True,
        ),
        router_pb2.ForwardRequest(
            layer=61,
            hidden_states=as_proto(drawn(3, 8, dtype=torch.bfloat16)),
            expert_ids=as_proto(IDS),
            expert_weights=as_proto(WEIGHTS),
            non_finite_policy=tensor_pb2.NON_FINITE_POLICY_PASS,
            include_shared=True,
            want_detail=True,
        ),
    ),
    "forward request, defaults": (
        FORWARD_REQUEST,
        ForwardRequest(layer=0, hidden_states=drawn(1, 4)),
        router_pb2.ForwardRequest(hidden_states=as_proto(drawn(1, 4))),
    ),
    "forward request, negative layer": (
        FORWARD_REQUEST,
        ForwardRequest(layer=-1, hidden_states=drawn(1, 4)),
        router_pb2.ForwardRequest(layer=-1, hidden_states=as_proto(drawn(1, 4))),
    ),
    "forward response, all fields": (
        FORWARD_RESPONSE,
        ForwardResponse(
            hidden_states=drawn(3, 8),
            expert_ids=IDS,
            expert_weights=WEIGHTS,
            bias_version=BIG_ID,
            epoch=1 << 40,
            retried_pairs=12,
        ),
        router_pb2.ForwardResponse(
            hidden_states=as_proto(drawn(3, 8)),
            expert_ids=as_proto(IDS),
            expert_weights=as_proto(WEIGHTS),
            bias_version=BIG_ID,
            epoch=1 << 40,
            retried_pairs=12,
        ),
    ),
    "forward response, defaults": (
        FORWARD_RESPONSE,
        ForwardResponse(hidden_states=drawn(1, 4)),
        router_pb2.ForwardResponse(hidden_states=as_proto(drawn(1, 4))),
    ),
    "forward request in FP8": (
        FORWARD_REQUEST,
        ForwardRequest(layer=1, hidden_states=FP8, want_detail=True, hidden_states_scale=SCALE),
        router_pb2.ForwardRequest(
            layer=1,
            hidden_states=as_proto(FP8),
            want_detail=True,
            hidden_states_scale=as_proto(SCALE),
        ),
    ),
    "forward response in FP8": (
        FORWARD_RESPONSE,
        ForwardResponse(hidden_states=FP8, retried_pairs=1, hidden_states_scale=SCALE),
        router_pb2.ForwardResponse(
            hidden_states=as_proto(FP8), retried_pairs=1, hidden_states_scale=as_proto(SCALE)
        ),
    ),
    "execute request in FP8": (
        EXECUTE_REQUEST,
        ExecuteRequest(
            layer=3,
            hidden_states=FP8,
            expert_ids=IDS.numpy(),
            expert_weights=WEIGHTS.numpy(),
            hidden_states_scale=SCALE,
        ),
        expert_pb2.ExecuteRequest(
            layer=3,
            hidden_states=as_proto(FP8),
            expert_ids=as_proto(IDS),
            expert_weights=as_proto(WEIGHTS),
            hidden_states_scale=as_proto(SCALE),
        ),
    ),
    "execute response in FP8": (
        EXECUTE_RESPONSE,
        ExecuteResponse(hidden_states=FP8, compute_us=9, hidden_states_scale=SCALE),
        expert_pb2.ExecuteResponse(
            hidden_states=as_proto(FP8), compute_us=9, hidden_states_scale=as_proto(SCALE)
        ),
    ),
    "execute request": (
        EXECUTE_REQUEST,
        ExecuteRequest(
            layer=3,
            hidden_states=drawn(3, 8, dtype=torch.float16),
            expert_ids=IDS.numpy(),
            expert_weights=WEIGHTS.numpy(),
            epoch=1 << 63,
        ),
        expert_pb2.ExecuteRequest(
            layer=3,
            hidden_states=as_proto(drawn(3, 8, dtype=torch.float16)),
            expert_ids=as_proto(IDS),
            expert_weights=as_proto(WEIGHTS),
            epoch=1 << 63,
        ),
    ),
    "execute response": (
        EXECUTE_RESPONSE,
        ExecuteResponse(hidden_states=drawn(3, 8), queue_us=128, compute_us=BIG_ID),
        expert_pb2.ExecuteResponse(
            hidden_states=as_proto(drawn(3, 8)), queue_us=128, compute_us=BIG_ID
        ),
    ),
}
pairs = pytest.mark.parametrize(("codec", "ours", "generated"), PAIRS.values(), ids=PAIRS)


@pairs
def test_a_message_is_the_bytes_that_generated_code_writes(codec, ours, generated) -> None:
    assert encode_whole(codec, ours) == generated.SerializeToString()


@pairs
def test_generated_bytes_are_read_back_field_by_field(codec, ours, generated) -> None:
    got = decode_whole(codec, generated.SerializeToString(), LIMIT)

    for name in ours.__slots__:
        wanted, found = getattr(ours, name), getattr(got, name)
        assert (
            same(found, wanted)
            if isinstance(wanted, torch.Tensor | np.ndarray)
            else found == wanted
        ), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)], ids=str)
def test_every_dtype_and_rank_survives_generated_code(dtype, shape) -> None:
    tensor = drawn(*shape, dtype=dtype)
    buffer = tensors.field(1, tensor)

    assert buffer == router_pb2.ForwardResponse(hidden_states=as_proto(tensor)).SerializeToString()
    assert same(decode_whole(FORWARD_RESPONSE, buffer, LIMIT).hidden_states, tensor)


def test_every_bit_pattern_of_bfloat16_survives_nan_payloads_too() -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    message = ForwardRequest(layer=0, hidden_states=patterns.view(256, 256))

    got = decode_whole(FORWARD_REQUEST, encode_whole(FORWARD_REQUEST, message), LIMIT)

    assert torch.equal(got.hidden_states.view(torch.int16), message.hidden_states.view(torch.int16))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (0, 0)], ids=str)
def test_a_tensor_without_elements_keeps_its_shape(shape) -> None:
    tensor = torch.empty(shape)
    buffer = tensors.field(1, tensor)

    assert buffer == router_pb2.ForwardResponse(hidden_states=as_proto(tensor)).SerializeToString()
    assert same(decode_whole(FORWARD_RESPONSE, buffer, LIMIT).hidden_states, tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        drawn(6, 8).t(),
        drawn(6, 8)[::2],
        drawn(6, 8)[:, 3:5],
        drawn(1, 8).expand(5, 8),
        drawn(4, 8)[2:],
    ],
    ids=["transposed", "every other row", "columns", "expanded", "offset"],
)
def test_a_strided_tensor_is_sent_row_major(tensor) -> None:
    message = ForwardRequest(layer=0, hidden_states=tensor, expert_weights=tensor)

    got = router_pb2.ForwardRequest.FromString(encode_whole(FORWARD_REQUEST, message))

    assert got.hidden_states == got.expert_weights == as_proto(tensor.contiguous())


def test_a_tensor_that_requires_grad_is_sent_without_its_graph() -> None:
    tensor = drawn(2, 4).requires_grad_()

    got = decode_whole(
        FORWARD_RESPONSE,
        encode_whole(FORWARD_RESPONSE, ForwardResponse(hidden_states=tensor)),
        LIMIT,
    )

    assert same(got.hidden_states, tensor)
    assert not got.hidden_states.requires_grad


def test_unpacked_shapes_are_read() -> None:
    tensor = drawn(2, 3)
    body = b"\x08\x01" + b"\x10\x02" + b"\x10\x03" + wire.field_bytes(3, tensors.payload(tensor))

    got = decode_whole(FORWARD_RESPONSE, wire.field_bytes(1, body), LIMIT)

    assert tensor_pb2.Tensor.FromString(body) == as_proto(tensor)
    assert same(got.hidden_states, tensor)


def test_fields_in_another_order_are_read() -> None:
    parts = [
        wire.field_varint(7, 1),
        tensors.field(4, WEIGHTS),
        tensors.field(3, IDS),
        tensors.field(2, drawn(3, 8)),
        wire.field_varint(1, 9),
    ]

    got = decode_whole(FORWARD_REQUEST, b"".join(parts), LIMIT)

    assert (got.layer, got.want_detail) == (9, True)
    assert same(got.hidden_states, drawn(3, 8))
    assert same(got.expert_ids, IDS)
    assert same(got.expert_weights, WEIGHTS)


UNKNOWN = [
    wire.field_varint(1000, BIG_ID),
    wire.field_double(1001, 2.5),
    wire.field_bytes(1002, b"\xff" * 300),
    wire.varint(1003 << 3 | wire.FIXED32) + b"abcd",
]


@pytest.mark.parametrize("unknown", UNKNOWN, ids=["varint", "fixed64", "bytes", "fixed32"])
@pairs
def test_unknown_fields_of_a_later_version_are_skipped(codec, ours, generated, unknown) -> None:
    known = generated.SerializeToString()

    got = decode_whole(codec, unknown + known + unknown, LIMIT)

    assert encode_whole(codec, got) == known


def test_unknown_fields_of_a_frame_and_of_a_tensor_are_skipped() -> None:
    body = as_proto(drawn(2, 2)).SerializeToString() + b"".join(UNKNOWN)
    start = frames.decode(
        wire.field_varint(1, 4) + UNKNOWN[0] + wire.field_bytes(2, wire.field_bytes(1, body))
    )

    assert isinstance(start, frames.Start)
    assert start.frame_id == 4


def test_received_tensors_view_the_received_bytes() -> None:
    message = PAIRS["forward request, all fields"][1]
    buffer = encode_whole(FORWARD_REQUEST, message)
    first = np.frombuffer(buffer, np.uint8).ctypes.data

    got = decode_whole(FORWARD_REQUEST, buffer, LIMIT)

    for tensor in (got.hidden_states, got.expert_ids, got.expert_weights):
        assert first <= tensor.data_ptr() < first + len(buffer)
        assert tensor.data_ptr() + tensor.nbytes <= first + len(buffer)


def test_a_received_tensor_keeps_the_received_bytes_alive() -> None:
    expected = drawn(64, 64)
    message = ForwardResponse(hidden_states=expected)

    tensor = decode_whole(
        FORWARD_RESPONSE, bytes(bytearray(encode_whole(FORWARD_RESPONSE, message))), LIMIT
    ).hidden_states
    churn = [bytearray(1 << 14) for _ in range(1000)]

    assert len(churn) == 1000
    assert same(tensor, expected)


# Stream messages.


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


# Refusals, before anything is allocated.


def refused(tensor: tensor_pb2.Tensor, limit: int = LIMIT) -> InvalidRequestError:
    buffer = router_pb2.ForwardRequest(hidden_states=tensor).SerializeToString()
    with pytest.raises(InvalidRequestError) as caught:
        FORWARD_REQUEST.decode(buffer, 0, len(buffer), limit)
    return caught.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_ids_of_a_type_that_numpy_does_not_have_are_refused(dtype) -> None:
    ids = as_proto(torch.ones(3, 2, dtype=dtype))
    buffer = expert_pb2.ExecuteRequest(hidden_states=as_proto(drawn(3, 8)), expert_ids=ids)

    for _ in range(2):  # a layout that was seen before is read another way
        with pytest.raises(InvalidRequestError, match="ids are int32") as caught:
            decode_whole(EXECUTE_REQUEST, buffer.SerializeToString(), LIMIT)
        assert caught.value.field == "expert_ids.data_type"


@pytest.mark.parametrize(
    "shape",
    [[1 << 20, 1 << 20], [(1 << 63) - 1], [(1 << 63) - 1] * 8, [LIMIT // 4 + 1]],
    ids=["4 TiB", "2^63", "2^504", "one element over"],
)
def test_a_shape_over_the_limit_is_refused_as_too_large(shape) -> None:
    error = refused(tensor_pb2.Tensor(data_type=1, shape=shape))

    assert type(error) is MessageTooLargeError
    assert "send fewer rows" in error.message


def test_a_shape_at_the_limit_is_taken() -> None:
    buffer = router_pb2.ForwardRequest(
        hidden_states=tensor_pb2.Tensor(data_type=1, shape=[LIMIT // 4])
    ).SerializeToString()

    assert FORWARD_REQUEST.decode(buffer, 0, len(buffer), LIMIT).hidden_states.total == LIMIT


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (tensor_pb2.Tensor(shape=[1], data=b"abcd"), "data_type is 0, expected one of float32"),
        (tensor_pb2.Tensor(data_type=99, shape=[1]), "data_type is 99"),  # type: ignore[arg-type]
        (tensor_pb2.Tensor(data_type=1, shape=[-1, -4]), "negative"),
        (tensor_pb2.Tensor(data_type=1, shape=[1] * 9, data=b"abcd"), "over 8 dimensions"),
        (tensor_pb2.Tensor(data_type=1, shape=[0, 1 << 40]), "over 2"),
        (tensor_pb2.Tensor(data_type=1, shape=[1], data=b"abcde"), "5 bytes but the shape"),
    ],
    ids=["no dtype", "unknown dtype", "negative", "rank 9", "huge beside 0", "excess byte"],
)
def test_a_tensor_whose_parts_disagree_is_refused_by_name(tensor, says) -> None:
    error = refused(tensor)

    assert type(error) is InvalidRequestError
    assert says in error.message
    assert error.field.startswith("hidden_states")


@pytest.mark.parametrize("shape", [[1 << 31] * 7 + [0], [0] + [1 << 31] * 7], ids=str)
def test_a_tensor_without_elements_but_with_huge_extents_is_ours_to_refuse(shape) -> None:
    buffer = router_pb2.ForwardRequest(
        hidden_states=tensor_pb2.Tensor(data_type=1, shape=shape)
    ).SerializeToString()

    with pytest.raises(InvalidRequestError):
        decode_whole(FORWARD_REQUEST, buffer, LIMIT)


@pytest.mark.parametrize(
    ("buffer", "says"),
    [
        (b"\x08", "ends inside a number"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "over 64 bits"),
        (b"\x08" + b"\xff" * 11, "over 64 bits"),
        (b"\x00\x01", "field number 0"),
        (b"\x0b", "wire type 3"),
        (b"\x12\x05abc", "wants 5 bytes but 3 are left"),
        (b"\x0a\x00", "layer has wire type 2, expected 0|field 1 has wire type 2, expected 0"),
        (b"\x10\x01", "hidden_states has wire type 0, expected 2"),
    ],
)
def test_bytes_that_are_no_such_message_are_refused(buffer, says) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        FORWARD_REQUEST.decode(buffer, 0, len(buffer), LIMIT)


def test_an_errors_text_that_is_no_utf_8_is_refused() -> None:
    buffer = wire.field_bytes(3, b"\xff")

    with pytest.raises(InvalidRequestError, match="not valid UTF-8"):
        frames.decode_error(buffer, 0, len(buffer))


def test_a_stream_message_without_a_kind_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="names no kind"):
        frames.decode(b"\x08\x05")


def test_messages_are_complete_as_protobuf_has_them() -> None:
    """A field added to the contract and forgotten in the hand-written codec fails here."""
    for ours, generated in (
        (messages.ForwardRequest, router_pb2.ForwardRequest),
        (messages.ForwardResponse, router_pb2.ForwardResponse),
        (messages.ExecuteRequest, expert_pb2.ExecuteRequest),
        (messages.ExecuteResponse, expert_pb2.ExecuteResponse),
    ):
        names = {"pass_non_finite" if f.name == "non_finite_policy" else f.name
                 for f in generated.DESCRIPTOR.fields}  # fmt: skip
        assert set(ours.__slots__) - {"room"} == names  # room is memory here, and never sent


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
