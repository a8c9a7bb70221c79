"""Bytes that are no message are refused before anything is allocated."""

from __future__ import annotations

import pytest
import torch

from expertmesh.codec import frames, wire
from expertmesh.codec.messages import EXECUTE_REQUEST, FORWARD_REQUEST, decode_whole
from expertmesh.errors import InvalidRequestError, MessageTooLargeError
from expertmesh.v1 import expert_pb2, router_pb2, tensor_pb2
from tests.codec import LIMIT, as_proto, drawn


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
