"""The calling end of a stream lends blocks of its memory to the answering end, frame by frame.

A block is lent from the moment its frame is sent until the peer returns it: with an answer that
lies in it, or with FrameReturned after any other end of the frame. Until then nothing here touches
it, whether anybody still waits for the frame or not. A stream that breaks may leave a peer that
still reads and writes: its arena is not used again, the next stream brings its own.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from expertmesh.codec import tensors
from expertmesh.codec.references import ALIGNMENT, Blocks
from expertmesh.codec.tensors import TensorPart
from expertmesh.config import SharedMemoryConfig
from expertmesh.errors import InvalidRequestError
from expertmesh.rpc.arena import HEADER_BYTES, Arena, Bytes, NotSharedError
from expertmesh.rpc.blocks import FreeList
from expertmesh.v1.tensor_pb2 import SharedMemoryAnswer

METADATA_KEY = "expertmesh-memory-bin"
#: Below, elements travel in the message: the copies cost less than to lend and return. One hop of a
#: data connection is 0.89 to 0.98 times as fast with memory lent for 4 to 32 KiB, 1.1 times from 64
#: KiB and 1.3 times at 1 MiB (benchmarks/bench_shared.py).
LEAST_BYTES = 64 << 10
#: From here on torch copies, which lets the interpreter lock go meanwhile.
_LARGE_BYTES = 1 << 20
_IDLE_S = 10.0  # after so long without a block, pages go back to the system


class _Loan:
    """One frame's blocks."""

    __slots__ = ("blocks", "sent")

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.sent = False  # whether the peer may know of it


class Lender:
    """One stream's arena. Used from one event loop, but for the death of views."""

    @classmethod
    def of(cls, config: SharedMemoryConfig, *, views: bool) -> Lender | None:
        """None where the configuration says "off"."""
        return cls(config.size_bytes, views=views) if config.mode == "auto" else None

    def __init__(self, size: int, *, views: bool, least_bytes: int = LEAST_BYTES) -> None:
        """Lends for hidden states of `least_bytes` or more.

        With `views`, an answer is handed out where it lies, and its block is free when its tensor
        dies: for those who keep answers briefly. Else it is copied.

        Where no memory can be shared, everything goes over TCP, and `refused` says why.
        """
        self._views = views
        self._least_bytes = least_bytes
        self._loans: dict[int, _Loan] = {}
        self._dead: deque[int] = deque()  # blocks whose views have died, on any thread
        self._references: dict[int, weakref.ref[Bytes]] = {}  # to those views, by block
        self._free = FreeList(0, 0)
        self._arena: Arena | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._last_used = 0.0
        self.accepted = False
        self.refused = ""
        self.full = 0  # frames that found no room and went over TCP
        try:
            self._arena = Arena(size)
            self._free = FreeList(HEADER_BYTES, self._arena.size)
        except NotSharedError as error:
            self.refused = str(error)

    @property
    def lent_bytes(self) -> int:
        """Bytes that the peer or a view may still use, or has just ceased to."""
        return self._free.used

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """What the call that opens the stream says of it."""
        if self._arena is None:
            return ()
        return ((METADATA_KEY, self._arena.offer().SerializeToString()),)

    def learn(self, metadata: Any) -> None:
        """Takes the peer's initial metadata."""
        answers = [value for key, value in metadata or () if key == METADATA_KEY]
        if not answers or self._arena is None:
            self.refused = self.refused or "the peer does not know shared memory"
            return
        try:
            answer = SharedMemoryAnswer.FromString(answers[0])
        except Exception as error:  # whatever it is, it is no answer
            self.refused = f"the peer's answer cannot be read: {error}"
            return
        self.accepted, self.refused = answer.accepted, answer.reason

    def lend(self, frame_id: int, hidden: torch.Tensor) -> Blocks | None:
        """Copies hidden states into a block; None when they shall go over TCP."""
        size = hidden.nbytes
        if not self.accepted or size < self._least_bytes:
            return None
        self._collect()
        room = -(-size // ALIGNMENT) * ALIGNMENT
        offset = self._free.take(2 * room)
        if offset is None:
            self.full += 1
            return None
        blocks = Blocks(offset, size, offset + room, size)
        self._write(offset, hidden)
        self._loans[frame_id] = _Loan(blocks)
        return blocks

    def _write(self, offset: int, hidden: torch.Tensor) -> None:
        assert self._arena is not None
        memory = self._arena.view(offset, hidden.nbytes)
        if hidden.nbytes < _LARGE_BYTES:
            memory.data[:] = tensors.payload(hidden)
        else:
            torch.from_numpy(memory).view(hidden.dtype).view(hidden.shape).copy_(hidden.detach())

    def sending(self, frame_id: int, message: bytes) -> Iterator[bytes]:
        """The frame's message; once it is taken, only the peer can return the blocks."""
        return _sending(self._loans[frame_id], message)

    def give_up(self, frame_id: int) -> None:
        """Nobody waits for the frame. Blocks that the peer has never heard of are free."""
        loan = self._loans.get(frame_id)
        if loan is not None and not loan.sent:
            self.returned(frame_id)

    def returned(self, frame_id: int) -> None:
        """The peer has returned the frame's blocks, if it had any."""
        loan = self._loans.pop(frame_id, None)
        if loan is not None:
            self._release(loan.blocks.offset)

    def fill(self, frame_id: int, part: TensorPart) -> None:
        """Completes an answer whose elements lie in the frame's block, which is now ours again.

        Raises InvalidRequestError when the frame has none, or it is too small.
        """
        loan = self._loans.get(frame_id)
        if loan is None or part.total > loan.blocks.answer_length:
            raise InvalidRequestError(f"an answer of {part.total} bytes does not lie in its block")
        assert self._arena is not None
        view = self._arena.view(loan.blocks.answer_offset, part.total)
        if self._views and part.total:
            part.refer(view.data)
            del self._loans[frame_id]
            offset = loan.blocks.offset
            self._references[offset] = weakref.ref(view, lambda _: self._dead.append(offset))
        else:
            part.refer(_copy(view).data)
            self.returned(frame_id)

    def _collect(self) -> None:
        while self._dead:
            offset = self._dead.popleft()
            del self._references[offset]
            self._release(offset)

    def _release(self, offset: int) -> None:
        self._free.give(offset)
        self._last_used = time.monotonic()
        if self._idle is None:
            self._idle = asyncio.get_running_loop().call_later(_IDLE_S, self._rest)

    def _rest(self) -> None:
        """Gives pages back when nothing was lent for a while."""
        self._idle = None
        self._collect()
        if self._arena is None or self._free.used:
            return  # the next release looks again
        left_s = self._last_used + _IDLE_S - time.monotonic()
        if left_s > 0:
            self._idle = asyncio.get_running_loop().call_later(left_s, self._rest)
        else:
            self._arena.release(self._free.forget())

    def close(self) -> None:
        """Lends no more; the memory goes when the peer and every view have let it go."""
        self.accepted = False
        if self._idle is not None:
            self._idle.cancel()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        self._loans.clear()


def _sending(loan: _Loan, message: bytes) -> Iterator[bytes]:
    loan.sent = True
    yield message


def _copy(view: Bytes) -> Bytes:
    if view.nbytes < _LARGE_BYTES:
        return view.copy()
    copied: Bytes = torch.from_numpy(view).clone().numpy()
    return copied
