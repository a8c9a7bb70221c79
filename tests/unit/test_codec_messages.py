"""Hand-written messages and generated code agree, in both directions, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from expertmesh.codec import frames, messages, tensors, wire
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
from expertmesh.v1 import expert_pb2, router_pb2, tensor_pb2
from tests.codec import BIG_ID, IDS, LIMIT, WEIGHTS, as_proto, drawn, same

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int32,
    torch.int64,
]


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
