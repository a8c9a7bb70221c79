"""One `.safetensors` file, read tensor by tensor with `pread`.

Layout: 8 bytes little-endian length n, n bytes of JSON `{name: {dtype, shape, data_offsets}}`, then
the data, without holes (https://github.com/huggingface/safetensors#format). Reading goes from the
page cache straight into the tensor: one copy, and no mapping that would count as our memory.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from expertmesh.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_MAX_HEADER_BYTES = 100_000_000  # what the format's own reader takes
#: Weights are read, checked and hashed in pieces of this size, each well under a millisecond.
PIECE_BYTES = 1 << 20
#: Called between pieces of work: a place to rest, for a reader in the background.
Pause = Callable[[], None]


def no_pause() -> None:
    """For whoever wants weights as fast as they come."""


class TensorInfo(NamedTuple):
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    num_bytes: int


class SafetensorsFile:
    """An open file whose header was checked. Reading is thread-safe.

    Raises CheckpointError, naming the file (and the tensor), when it is not a whole, sane
    safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Tensors of a dtype that is not known here, which cannot be read: name → dtype.
        self.unreadable: dict[str, str] = {}
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {because(error, path)}") from error
        try:
            self.tensors: Mapping[str, TensorInfo] = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; reading is over. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, name: str, pause: Pause = no_pause) -> torch.Tensor:
        """One whole tensor, in its stored dtype. Raises KeyError when it is not in this file."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        start = info.start
        for piece in pieces(tensor):
            self._read_into(piece, start, name)
            start += len(piece)
            pause()
        return tensor

    def read_span(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` elements of a tensor from the `first` on, in row-major order."""
        info = self.tensors[name]
        tensor = torch.empty(count, dtype=info.dtype, device="cpu")
        self._read_into(memory(tensor), info.start + first * info.dtype.itemsize, name)
        return tensor

    def sample(self, name: str, num_bytes: int) -> bytes:
        """Up to `num_bytes` bytes from the middle of a tensor."""
        info = self.tensors[name]
        buffer = bytearray(min(num_bytes, info.num_bytes))
        start = info.start + (info.num_bytes - len(buffer)) // 2
        self._read_into(memoryview(buffer), start, name)
        return bytes(buffer)

    def _read_into(self, buffer: memoryview, start: int, what: str) -> None:
        done = 0
        while done < len(buffer):  # one preadv moves at most 2 GiB
            try:
                count = os.preadv(self._fd, [buffer[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {what}: {error.strerror}") from error
            if not count:
                raise CheckpointError(
                    f"{self.path}: {what}: the file ends at byte {start + done}, "
                    f"{len(buffer) - done} bytes too early"
                )
            done += count

    def _read_header(self) -> dict[str, TensorInfo]:
        size = os.fstat(self._fd).st_size
        prefix = bytearray(8)
        self._read_into(memoryview(prefix), 0, "header length")
        length = int.from_bytes(prefix, "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{self.path}: says its header has {length} bytes, but the file has {size}: "
                "truncated, or not a safetensors file"
            )
        text = bytearray(length)
        self._read_into(memoryview(text), 8, "header")
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: its header is not JSON: {error}") from error
        if not isinstance(entries, dict):
            raise CheckpointError(f"{self.path}: its header is not a JSON object")
        entries.pop("__metadata__", None)
        tensors = {name: self._parse(name, entry, 8 + length) for name, entry in entries.items()}
        self._check_layout(tensors, 8 + length, size)
        return {name: info for name, info in tensors.items() if name not in self.unreadable}

    def _parse(self, name: str, entry: object, data_start: int) -> TensorInfo:
        if not isinstance(entry, dict):
            raise CheckpointError(f"{self.path}: {name}: its header entry is not an object")
        shape = tuple(self._sizes(name, "shape", entry))
        offsets = list(self._sizes(name, "data_offsets", entry))
        dtype = DTYPES.get(str(entry.get("dtype")))
        if dtype is None:  # an error only for whoever wants to read it
            self.unreadable[name] = str(entry.get("dtype"))
            num_bytes = max(0, offsets[-1] - offsets[0]) if offsets else 0
        else:
            num_bytes = math.prod(shape) * dtype.itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
            raise CheckpointError(
                f"{self.path}: {name}: data_offsets {offsets} do not hold the {num_bytes} bytes "
                f"of {list(shape)} {entry['dtype']}"
            )
        return TensorInfo(dtype or torch.uint8, shape, data_start + offsets[0], num_bytes)

    def _sizes(self, name: str, key: str, entry: Mapping[str, object]) -> Iterator[int]:
        values = entry.get(key)
        for value in values if isinstance(values, list) else [values]:
            if type(value) is not int or value < 0:
                raise CheckpointError(f"{self.path}: {name}: {key} is {values!r}")
            yield value

    def _check_layout(self, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
        """The data is one run without holes or overlaps, up to the end of the file."""
        for name, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
            if info.start != start:
                raise CheckpointError(
                    f"{self.path}: {name}: starts at byte {info.start}, expected {start}: "
                    "tensors overlap or leave a hole"
                )
            start += info.num_bytes
            if start > size:
                raise CheckpointError(
                    f"{self.path}: {name}: ends at byte {start}, but the file has only {size} "
                    "bytes: truncated"
                )
        if start != size:
            raise CheckpointError(f"{self.path}: {size - start} bytes follow the last tensor")


def because(error: OSError, path: Path) -> str:
    """Why a file could not be opened; says so where it is a link that leads nowhere."""
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return (
            f"it is a symbolic link to {os.readlink(path)}, which is not there: the download was "
            "not completed, or only the links were copied"
        )
    return str(error.strerror)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not a copy: valid while the tensor lives.

    Works for every dtype (numpy has no bfloat16) and leaves torch's 64-byte alignment alone.
    """
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError("memory() takes a contiguous tensor on the CPU")
    num_bytes = tensor.numel() * tensor.element_size()
    if not num_bytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * num_bytes).from_address(tensor.data_ptr())).cast("B")


def pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's `memory` from start to end, PIECE_BYTES at a time."""
    whole = memory(tensor)
    for start in range(0, len(whole), PIECE_BYTES):
        yield whole[start : start + PIECE_BYTES]
