"""The four messages that carry hidden states, and how each becomes bytes and back.

Encoders give (head, tail): the message is `head + elements of hidden_states + tail`, so that the
elements are joined in once, whole or cut in chunks. Decoders give the message with its
hidden states as a `TensorPart`, because the rest may follow in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from expertmesh.codec import tensors, wire
from expertmesh.codec.tensors import Array, TensorPart
from expertmesh.codec.wire import Buffer

PASS = 2  # of NonFinitePolicy; whatever else it says, the request is refused


class Room(Protocol):
    """Memory that a caller has lent for an answer."""

    def like(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Of the tensor's shape and dtype; None where there is too little, or no longer any."""
        ...


@dataclass(slots=True, kw_only=True)
class ForwardRequest:
    """router.proto ForwardRequest."""

    layer: int
    hidden_states: torch.Tensor  # [T, H]
    expert_ids: torch.Tensor | None = None  # [T, k] int32
    expert_weights: torch.Tensor | None = None  # [T, k] float32
    pass_non_finite: bool = False
    include_shared: bool = False
    want_detail: bool = False
    hidden_states_scale: torch.Tensor | None = None  # [T] float32, beside FP8
    room: Room | None = None  # where the answer may be written; never sent


@dataclass(slots=True, kw_only=True)
class ForwardResponse:
    """router.proto ForwardResponse."""

    hidden_states: torch.Tensor  # [T, H]
    expert_ids: torch.Tensor | None = None  # [T, k] int32
    expert_weights: torch.Tensor | None = None  # [T, k] float32
    bias_version: int = 0
    epoch: int = 0
    retried_pairs: int = 0
    hidden_states_scale: torch.Tensor | None = None  # [T] float32, beside FP8


@dataclass(slots=True, kw_only=True)
class ExecuteRequest:
    """expert.proto ExecuteRequest."""

    layer: int
    hidden_states: torch.Tensor  # [R, H]
    #: [R, k] int32 and float32: arrays, as whoever plans and checks them wants (codec.tensors).
    expert_ids: Array
    expert_weights: Array
    epoch: int = 0
    hidden_states_scale: torch.Tensor | None = None  # [R] float32, beside FP8
    room: Room | None = None  # where the answer may be written; never sent


@dataclass(slots=True, kw_only=True)
class ExecuteResponse:
    """expert.proto ExecuteResponse."""

    hidden_states: torch.Tensor  # [R, H]
    queue_us: int = 0
    compute_us: int = 0
    hidden_states_scale: torch.Tensor | None = None  # [R] float32, beside FP8


Message = ForwardRequest | ForwardResponse | ExecuteRequest | ExecuteResponse
M = TypeVar("M", ForwardRequest, ForwardResponse, ExecuteRequest, ExecuteResponse)


class Pending(Generic[M]):
    """A decoded message whose hidden states may still be arriving."""

    __slots__ = ("_message", "hidden_states")

    def __init__(self, message: M, hidden_states: TensorPart) -> None:
        self._message: M = message
        self.hidden_states = hidden_states

    def finish(self) -> M:
        """The message. Raises InvalidRequestError when elements are missing."""
        whole = tensors.require_complete(self.hidden_states, "hidden_states")
        self._message.hidden_states = whole
        return self._message


class Codec(Protocol[M]):
    """How one message type becomes bytes and back."""

    def encode(self, message: M, data_length: int) -> tuple[bytes, bytes]:
        """(head, tail) around `data_length` bytes of hidden states."""
        ...

    def decode(self, buffer: Buffer, at: int, end: int, max_bytes: int) -> Pending[M]:
        """Reads buffer[at:end]. Raises InvalidRequestError, nothing else."""
        ...


_NO_PART = TensorPart(torch.float32, (0,), 0, 0, b"", 0)
_NO_TENSOR = torch.empty(0, dtype=torch.float32, device="cpu")
_NO_ARRAY = np.empty(0, np.float32)
_NO_FIELDS: dict[int, str] = {}


class _Fields:
    """Collects the fields of one message; unknown ones are skipped, as protobuf asks."""

    __slots__ = ("arrays", "hidden", "numbers", "tensors")

    def __init__(
        self,
        buffer: Buffer,
        at: int,
        end: int,
        max_bytes: int,
        *,
        hidden: int,
        tensors_: dict[int, str],
        arrays: dict[int, str] = _NO_FIELDS,
        integers: tuple[int, ...],
    ) -> None:
        self.hidden = _NO_PART
        self.tensors: dict[int, torch.Tensor] = {}
        self.arrays: dict[int, Array] = {}
        self.numbers: dict[int, int] = {}
        for number, kind, value, upto in wire.fields(buffer, at, end):
            if number == hidden:
                wire.expect(kind, wire.BYTES, "hidden_states")
                self.hidden = tensors.read(buffer, value, upto, "hidden_states", max_bytes)
            elif number in tensors_:
                name = tensors_[number]
                wire.expect(kind, wire.BYTES, name)
                self.tensors[number] = tensors.read_whole(buffer, value, upto, name, max_bytes)
            elif number in arrays:
                name = arrays[number]
                wire.expect(kind, wire.BYTES, name)
                self.arrays[number] = tensors.read_array(buffer, value, upto, name, max_bytes)
            elif number in integers:
                wire.expect(kind, wire.VARINT, f"field {number}")
                self.numbers[number] = value

    def int32(self, number: int) -> int:
        """A signed field, 0 when absent."""
        return wire.signed(self.numbers.get(number, 0), 32)


class ForwardRequestCodec:
    """ForwardRequest of router.proto."""

    def encode(self, message: ForwardRequest, data_length: int) -> tuple[bytes, bytes]:
        """See Codec."""
        head = wire.field_varint(1, message.layer)
        head += tensors.header(message.hidden_states, 2, data_length)[0]
        tail = b"".join(
            (
                tensors.field(3, message.expert_ids),
                tensors.field(4, message.expert_weights),
                wire.field_varint(5, PASS if message.pass_non_finite else 0),
                wire.field_varint(6, message.include_shared),
                wire.field_varint(7, message.want_detail),
                tensors.field(9, message.hidden_states_scale),
            )
        )
        return head, tail

    def decode(self, buffer: Buffer, at: int, end: int, max_bytes: int) -> Pending[ForwardRequest]:
        """See Codec."""
        got = _Fields(
            buffer,
            at,
            end,
            max_bytes,
            hidden=2,
            tensors_={3: "expert_ids", 4: "expert_weights", 9: "hidden_states_scale"},
            integers=(1, 5, 6, 7),
        )
        message = ForwardRequest(
            layer=got.int32(1),
            hidden_states=_NO_TENSOR,
            expert_ids=got.tensors.get(3),
            expert_weights=got.tensors.get(4),
            pass_non_finite=got.numbers.get(5, 0) == PASS,
            include_shared=bool(got.numbers.get(6, 0)),
            want_detail=bool(got.numbers.get(7, 0)),
            hidden_states_scale=got.tensors.get(9),
        )
        return Pending(message, got.hidden)


class ForwardResponseCodec:
    """ForwardResponse of router.proto."""

    def encode(self, message: ForwardResponse, data_length: int) -> tuple[bytes, bytes]:
        """See Codec."""
        tail = b"".join(
            (
                tensors.field(2, message.expert_ids),
                tensors.field(3, message.expert_weights),
                wire.field_varint(4, message.bias_version),
                wire.field_varint(5, message.epoch),
                wire.field_varint(6, message.retried_pairs),
                tensors.field(7, message.hidden_states_scale),
            )
        )
        return tensors.header(message.hidden_states, 1, data_length)[0], tail

    def decode(self, buffer: Buffer, at: int, end: int, max_bytes: int) -> Pending[ForwardResponse]:
        """See Codec."""
        got = _Fields(
            buffer,
            at,
            end,
            max_bytes,
            hidden=1,
            tensors_={2: "expert_ids", 3: "expert_weights", 7: "hidden_states_scale"},
            integers=(4, 5, 6),
        )
        message = ForwardResponse(
            hidden_states=_NO_TENSOR,
            expert_ids=got.tensors.get(2),
            expert_weights=got.tensors.get(3),
            bias_version=got.numbers.get(4, 0),
            epoch=got.numbers.get(5, 0),
            retried_pairs=got.numbers.get(6, 0),
            hidden_states_scale=got.tensors.get(7),
        )
        return Pending(message, got.hidden)


class ExecuteRequestCodec:
    """ExecuteRequest of expert.proto."""

    def encode(self, message: ExecuteRequest, data_length: int) -> tuple[bytes, bytes]:
        """See Codec."""
        head = wire.field_varint(1, message.layer)
        head += tensors.header(message.hidden_states, 2, data_length)[0]
        tail = b"".join(
            (
                tensors.array_field(3, message.expert_ids),
                tensors.array_field(4, message.expert_weights),
                wire.field_varint(5, message.epoch),
                tensors.field(9, message.hidden_states_scale),
            )
        )
        return head, tail

    def decode(self, buffer: Buffer, at: int, end: int, max_bytes: int) -> Pending[ExecuteRequest]:
        """See Codec."""
        got = _Fields(
            buffer,
            at,
            end,
            max_bytes,
            hidden=2,
            tensors_={9: "hidden_states_scale"},
            arrays={3: "expert_ids", 4: "expert_weights"},
            integers=(1, 5),
        )
        message = ExecuteRequest(
            layer=got.int32(1),
            hidden_states=_NO_TENSOR,
            expert_ids=got.arrays.get(3, _NO_ARRAY),
            expert_weights=got.arrays.get(4, _NO_ARRAY),
            epoch=got.numbers.get(5, 0),
            hidden_states_scale=got.tensors.get(9),
        )
        return Pending(message, got.hidden)


class ExecuteResponseCodec:
    """ExecuteResponse of expert.proto."""

    def encode(self, message: ExecuteResponse, data_length: int) -> tuple[bytes, bytes]:
        """See Codec."""
        tail = wire.field_varint(4, message.queue_us) + wire.field_varint(5, message.compute_us)
        tail += tensors.field(6, message.hidden_states_scale)
        return tensors.header(message.hidden_states, 1, data_length)[0], tail

    def decode(self, buffer: Buffer, at: int, end: int, max_bytes: int) -> Pending[ExecuteResponse]:
        """See Codec."""
        got = _Fields(
            buffer,
            at,
            end,
            max_bytes,
            hidden=1,
            tensors_={6: "hidden_states_scale"},
            integers=(4, 5),
        )
        message = ExecuteResponse(
            hidden_states=_NO_TENSOR,
            queue_us=got.numbers.get(4, 0),
            compute_us=got.numbers.get(5, 0),
            hidden_states_scale=got.tensors.get(6),
        )
        return Pending(message, got.hidden)


FORWARD_REQUEST = ForwardRequestCodec()
FORWARD_RESPONSE = ForwardResponseCodec()
EXECUTE_REQUEST = ExecuteRequestCodec()
EXECUTE_RESPONSE = ExecuteResponseCodec()


def encode_whole(codec: Codec[M], message: M) -> bytes:
    """One message, whole, as for a unary RPC."""
    data = tensors.payload(message.hidden_states)
    head, tail = codec.encode(message, len(data))
    return b"".join((head, data, tail))


def decode_whole(codec: Codec[M], buffer: Buffer, max_bytes: int) -> M:
    """One message, whole, as from a unary RPC. Raises InvalidRequestError."""
    return codec.decode(buffer, 0, len(buffer), max_bytes).finish()
