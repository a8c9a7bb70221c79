"""Tensors on the wire: message `Tensor` of tensor.proto, without copying the elements."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.codec import wire
from expertmesh.codec.wire import Buffer
from expertmesh.errors import InvalidRequestError, MessageTooLargeError

# Received bytes are immutable and every tensor viewing them is only read; torch cannot know, and
# warns once in a process. Here, that is: a filter would not outlive `-W error` or pytest's own.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))

#: DataType of tensor.proto by torch dtype.
NUMBER_BY_DTYPE: dict[torch.dtype, int] = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float8_e4m3fn: 4,
    torch.int32: 5,
    torch.int64: 6,
}
DTYPE_BY_NUMBER = {number: dtype for dtype, number in NUMBER_BY_DTYPE.items()}
_MAX_RANK = 8
#: Layouts of tensors, as encoders write and decoders find them: sizes come again and again.
_REMEMBERED = 1024

# Small tensors pass through numpy, which keeps the interpreter lock: every torch operation lets it
# go, and with the event loop's and gRPC's threads about, getting it back costs more than the work.
_NUMPY_BY_DTYPE: dict[torch.dtype, npt.DTypeLike] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,  # numpy has none: viewed as bfloat16 afterwards
    torch.float8_e4m3fn: np.uint8,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
_IN_NUMPY = frozenset((torch.float32, torch.float16, torch.int32, torch.int64))
_DTYPE_BY_NUMPY = {np.dtype(_NUMPY_BY_DTYPE[dtype]): dtype for dtype in _IN_NUMPY}
Array = npt.NDArray[Any]


class _Layout(NamedTuple):
    """What the bytes before a tensor's elements say, once it has been checked."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    total: int  # bytes of the whole tensor
    have: int  # bytes of elements that follow


_layouts: dict[bytes, _Layout] = {}


@dataclass(slots=True)
class TensorPart:
    """A tensor of which `have` bytes have arrived."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    total: int  # bytes of the whole tensor
    have: int
    buffer: Buffer  # holds the bytes that arrived, from `start` on
    start: int
    storage: torch.Tensor | None = None  # uint8 [total], once a chunk has to be appended

    @property
    def complete(self) -> bool:
        """Whether every element is here."""
        return self.have == self.total

    def room(self, size: int) -> memoryview | None:
        """Memory for the next bytes, to be written and then `written`; None for too many."""
        if self.have + size > self.total:
            return None
        if self.storage is None:
            self._store()
        assert isinstance(self.buffer, memoryview)
        return self.buffer[self.have : self.have + size]

    def written(self, size: int) -> None:
        """So many bytes have been written where `room` was."""
        self.have += size

    def _store(self) -> None:
        """Makes memory for every byte, and puts those there that are here."""
        self.storage = torch.empty(self.total, dtype=torch.uint8, device="cpu")
        view = self.storage.numpy().data
        view[: self.have] = memoryview(self.buffer)[self.start : self.start + self.have]
        self.buffer, self.start = view, 0

    def append(self, buffer: Buffer, start: int, end: int) -> None:
        """Adds the next bytes. Raises InvalidRequestError when there are too many."""
        size = end - start
        room = self.room(size)
        if room is None:
            raise InvalidRequestError(
                f"chunks bring {self.have + size} bytes but the shape {list(self.shape)} holds "
                f"{self.total}",
                field="hidden_states.data",
            )
        room[:] = memoryview(buffer)[start:end]
        self.written(size)

    def refer(self, memory: memoryview) -> None:
        """Takes every element from elsewhere: `total` bytes in memory that the peer shares."""
        if self.have:
            raise InvalidRequestError(
                f"hidden_states.data has {self.have} bytes, expected none beside blocks",
                field="hidden_states.data",
            )
        self.buffer, self.start, self.have = memory, 0, self.total

    def tensor(self) -> torch.Tensor:
        """The tensor; a view of what was received wherever possible."""
        if self.total == 0:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self.storage is not None:
            return self.storage.view(self.dtype).view(self.shape)
        return _view(self.buffer, self.start, self.dtype, self.shape, self.total)


def payload(tensor: torch.Tensor) -> memoryview:
    """The elements of a CPU tensor as bytes; copies only when they are not contiguous."""
    if tensor.numel() == 0:
        return memoryview(b"")
    if tensor.requires_grad:
        tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    if tensor.dtype not in _IN_NUMPY:
        tensor = tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16)
    return tensor.numpy().data.cast("B")


def is_part(tensor: torch.Tensor) -> bool:
    """Whether it is less than half of the memory that it keeps: some rows of a batch, say."""
    return tensor.untyped_storage().nbytes() > 2 * tensor.nbytes


def header(tensor: torch.Tensor, number: int, data_length: int) -> tuple[bytes, int]:
    """(what stands before the elements of field `number`, length of the field with its prefix).

    `data_length` is the number of element bytes that follow, fewer than all for a prefix.
    """
    head = _header(tensor.dtype, tensor.shape, number, data_length)
    return head, len(head) + data_length


@lru_cache(_REMEMBERED)
def _header(dtype: torch.dtype, shape: tuple[int, ...], number: int, data_length: int) -> bytes:
    extents = b"".join(map(wire.varint, shape))
    head = b"\x08" + wire.varint(NUMBER_BY_DTYPE[dtype])
    if extents:
        head += wire.field_bytes(2, extents)
    if data_length:
        head += wire.length_prefix(3, data_length)
    return wire.length_prefix(number, len(head) + data_length) + head


def field(number: int, tensor: torch.Tensor | None) -> bytes:
    """A whole small tensor as one field; nothing for None."""
    if tensor is None:
        return b""
    data = payload(tensor)
    return b"".join((header(tensor, number, len(data))[0], data))


def array_field(number: int, array: Array) -> bytes:
    """`field` for an array of float32, float16, int32 or int64."""
    dtype, data = _DTYPE_BY_NUMPY[array.dtype], array.tobytes()
    return _header(dtype, array.shape, number, len(data)) + data


def read(buffer: Buffer, at: int, end: int, name: str, max_bytes: int) -> TensorPart:
    """Reads one `Tensor` message; its elements may be a prefix.

    Raises InvalidRequestError when the parts disagree, MessageTooLargeError when the shape holds
    more than `max_bytes`.
    """
    start = _elements_at(buffer, at, end)
    layout = _layouts.get(bytes(buffer[at:start]))
    if layout is not None and layout.have == end - start and layout.total <= max_bytes:
        return TensorPart(layout.dtype, layout.shape, layout.total, layout.have, buffer, start)
    part, stop = _read_fields(buffer, at, end, name, max_bytes)
    if start + part.have == end and (stop == end or not part.have):
        # Whatever stands before the elements is the layout.
        if len(_layouts) >= _REMEMBERED:
            _layouts.clear()
        layout = _Layout(part.dtype, part.shape, part.total, part.have)
        _layouts[bytes(buffer[at:start])] = layout
    return part


def read_whole(buffer: Buffer, at: int, end: int, name: str, max_bytes: int) -> torch.Tensor:
    """The tensor of a `Tensor` message that has all elements. Raises as `read` does, and
    InvalidRequestError when some are missing."""
    start = _elements_at(buffer, at, end)
    layout = _layouts.get(bytes(buffer[at:start]))
    if layout is not None and 0 < layout.total == layout.have == end - start <= max_bytes:
        return _view(buffer, start, layout.dtype, layout.shape, layout.total)
    return require_complete(read(buffer, at, end, name, max_bytes), name)


def read_array(buffer: Buffer, at: int, end: int, name: str, max_bytes: int) -> Array:
    """`read_whole` as an array. InvalidRequestError is also for types that numpy does not have."""
    start = _elements_at(buffer, at, end)
    layout = _layouts.get(bytes(buffer[at:start]))
    if (
        layout is not None
        and layout.dtype in _IN_NUMPY
        and 0 < layout.total == layout.have == end - start <= max_bytes
    ):
        return _elements(buffer, start, layout.dtype, layout.shape, layout.total)
    tensor = require_complete(read(buffer, at, end, name, max_bytes), name)
    if tensor.dtype not in _IN_NUMPY:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InvalidRequestError(
            f"{name} are {kind}: ids are int32, and weights float32", field=f"{name}.data_type"
        )
    return tensor.numpy()


def _view(
    buffer: Buffer, start: int, dtype: torch.dtype, shape: tuple[int, ...], size: int
) -> torch.Tensor:
    """A tensor of `size` bytes, one or more, where they lie in the buffer."""
    tensor = torch.from_numpy(_elements(buffer, start, dtype, shape, size))
    return tensor if dtype in _IN_NUMPY else tensor.view(dtype)


def _elements(
    buffer: Buffer, start: int, dtype: torch.dtype, shape: tuple[int, ...], size: int
) -> Array:
    """The same as an array, of what stands in for types that numpy does not have."""
    flat = np.frombuffer(buffer, _NUMPY_BY_DTYPE[dtype], size // dtype.itemsize, start)
    return flat.reshape(shape)


def _elements_at(buffer: Buffer, at: int, end: int) -> int:
    """Where the elements begin, if the tensor is laid out as every encoder does it; `end` where
    none are there, because they lie in shared memory."""
    if end - at < 4:
        return at
    start = at + 5 + buffer[at + 3]  # type and extents, each with its tag, and the elements' tag
    if start > end:
        return end
    last = min(end - 1, start + 5)
    while start < last and buffer[start] > 127:
        start += 1
    return start + 1


def _read_fields(
    buffer: Buffer, at: int, end: int, name: str, max_bytes: int
) -> tuple[TensorPart, int]:
    """The tensor, read field by field, and where its elements end."""
    dtype_number, shape, start, stop = 0, [], at, at
    for number, kind, value, upto in wire.fields(buffer, at, end):
        if number == 1:
            wire.expect(kind, wire.VARINT, f"{name}.data_type")
            dtype_number = value
        elif number == 2:
            shape += _extents(buffer, kind, value, upto, name)
            if len(shape) > _MAX_RANK:
                raise InvalidRequestError(f"{name} has over {_MAX_RANK} dimensions", field=name)
        elif number == 3:
            wire.expect(kind, wire.BYTES, f"{name}.data")
            start, stop = value, upto
    return _checked(buffer, dtype_number, tuple(shape), start, stop, name, max_bytes), stop


def _extents(buffer: Buffer, kind: int, value: int, upto: int, name: str) -> list[int]:
    if kind == wire.VARINT:  # a peer may send repeated integers unpacked
        return [wire.signed(value)]
    wire.expect(kind, wire.BYTES, f"{name}.shape")
    extents: list[int] = []
    while value < upto and len(extents) <= _MAX_RANK:
        extent, value = wire.read_varint(buffer, value, upto)
        extents.append(wire.signed(extent))
    return extents


def _checked(
    buffer: Buffer,
    dtype_number: int,
    shape: tuple[int, ...],
    start: int,
    stop: int,
    name: str,
    max_bytes: int,
) -> TensorPart:
    dtype = DTYPE_BY_NUMBER.get(dtype_number)
    if dtype is None:
        known = ", ".join(str(d).removeprefix("torch.") for d in NUMBER_BY_DTYPE)
        raise InvalidRequestError(
            f"{name}.data_type is {dtype_number}, expected one of {known}",
            field=f"{name}.data_type",
        )
    if any(extent < 0 for extent in shape):
        raise InvalidRequestError(f"{name}.shape {list(shape)} has a negative extent", field=name)
    total = math.prod(shape) * dtype.itemsize
    if total > max_bytes:
        raise MessageTooLargeError(
            f"{name} of shape {list(shape)} holds {total} bytes, over the limit of {max_bytes}: "
            "send fewer rows at a time",
            field=name,
        )
    if total == 0 and math.prod(max(extent, 1) for extent in shape) > 1 << 31:
        # Nothing to allocate, but torch's strides would overflow.
        raise InvalidRequestError(f"{name}.shape {list(shape)} has extents over 2^31", field=name)
    have = stop - start
    if have > total:
        raise InvalidRequestError(
            f"{name}.data has {have} bytes but the shape {list(shape)} holds {total}", field=name
        )
    return TensorPart(dtype, shape, total, have, buffer, start)


def require_complete(part: TensorPart, name: str) -> torch.Tensor:
    """The tensor, or InvalidRequestError when elements are missing."""
    if not part.complete:
        raise InvalidRequestError(
            f"{name}.data has {part.have} bytes but the shape {list(part.shape)} needs "
            f"{part.total}",
            field=f"{name}.data",
        )
    return part.tensor()
