"""The answering end of a stream uses blocks of the caller's memory, and says when it has ceased to.

A block is in use as long as any array or tensor views it, on whichever thread: a device that still
reads the rows of a frame that was given up, or a worker that writes its answer. So it is the death
of the views that is awaited, not the end of the request.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from google.protobuf.message import DecodeError

from expertmesh.codec.references import Blocks
from expertmesh.codec.tensors import TensorPart
from expertmesh.errors import InvalidRequestError
from expertmesh.rpc.arena import HEADER_BYTES, Bytes, Memory, NotSharedError, open_offered
from expertmesh.rpc.lending import METADATA_KEY
from expertmesh.v1.tensor_pb2 import SharedMemoryAnswer, SharedMemoryOffer


class Lease:
    """The use of one frame's blocks."""

    __slots__ = ("_ended", "_left", "_references")

    def __init__(self, views: tuple[Bytes, ...]) -> None:
        self._ended: list[Callable[[], None]] = []
        self._left = list(range(len(views)))
        self._references = [weakref.ref(view, self._died) for view in views]

    def when_ended(self, call: Callable[[], None]) -> None:
        """Calls back once, now or on the thread on which the last view dies."""
        self._ended.append(call)
        self._tell()

    def _died(self, _: object) -> None:
        self._left.pop()
        self._tell()

    def _tell(self) -> None:
        # `append` and `pop` are atomic, so that of two threads one sees what both have done; and a
        # garbage collector may bring us here from anywhere, so that no lock could be taken.
        if not self._left:
            try:
                call = self._ended.pop()
            except IndexError:
                return
            call()


class Borrowed:
    """What a frame has of the caller's memory."""

    __slots__ = ("lease", "room")

    def __init__(self, lease: Lease, room: Bytes) -> None:
        self.lease = lease
        self.room: Bytes | None = room  # for the answer

    def like(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """See `Room`. From any thread."""
        size, room = tensor.nbytes, self.room
        if room is None or not 0 < size <= room.nbytes:
            return None
        return torch.from_numpy(room[:size]).view(tensor.dtype).view(tensor.shape)

    def give_back(self, call: Callable[[], None]) -> None:
        """Calls back when nothing uses the memory any more; see `Lease.when_ended`."""
        self.room = None
        self.lease.when_ended(call)


class Borrower:
    """One stream's view of its caller's memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def borrow(self, blocks: Blocks, part: TensorPart) -> Borrowed:
        """Completes a request whose elements lie in the blocks. Raises InvalidRequestError."""
        blocks.check(part.total, HEADER_BYTES, self._memory.size)
        rows = self._memory.view(blocks.offset, blocks.length)
        room = self._memory.view(blocks.answer_offset, blocks.answer_length)
        lease = Lease((rows, room))
        part.refer(rows.data)
        return Borrowed(lease, room)


def take_offer(
    metadata: Any, max_bytes: int
) -> tuple[Borrower | None, tuple[tuple[str, bytes], ...]]:
    """(the memory that a stream's metadata offers, if it can be used; metadata to answer with).

    Neither where there is no offer: `(None, ())`.
    """
    offers = [value for key, value in metadata or () if key == METADATA_KEY]
    if not offers:
        return None, ()
    borrower, answer = None, SharedMemoryAnswer(accepted=True)
    try:
        borrower = Borrower(open_offered(SharedMemoryOffer.FromString(offers[0]), max_bytes))
    except (NotSharedError, DecodeError) as error:
        answer = SharedMemoryAnswer(reason=str(error))
    return borrower, ((METADATA_KEY, answer.SerializeToString()),)


def require(borrower: Borrower | None) -> Borrower:
    """Raises InvalidRequestError when the stream shares no memory."""
    if borrower is None:
        raise InvalidRequestError(
            "this stream shares no memory: send the elements in the message", field="blocks"
        )
    return borrower
