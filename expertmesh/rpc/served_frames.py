"""The frames of one stream at its answering end: those that arrive and those being answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from expertmesh.codec import frames, tensors
from expertmesh.codec.frames import Message
from expertmesh.codec.messages import Codec, Pending
from expertmesh.codec.wire import Buffer
from expertmesh.errors import (
    CancelledRequestError,
    DeadlineError,
    InvalidRequestError,
    MeshError,
)
from expertmesh.rpc import borrowing
from expertmesh.rpc.admission import OK, Admission
from expertmesh.rpc.answering import UNANSWERED, answer, forget, internal
from expertmesh.rpc.arena import Bytes
from expertmesh.rpc.borrowing import Borrowed, Borrower
from expertmesh.rpc.data_connection import Place
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.outbox import Outbox
from expertmesh.rpc.timers import Timer, Timers

_NO_FRAME = -1  # in an outbox: a message that belongs to no frame
_LARGE_BYTES = 1 << 20  # answers from here on are copied on a thread, not on the event loop
_INCOMPLETE = InvalidRequestError(
    "the stream ended before all chunks of the hidden states had come: send them all",
    field="hidden_states.data",
)
_LATE = DeadlineError(
    "the deadline passed before all chunks of the hidden states had come: allow more time"
)


class FrameProtocol:
    """What a stream carries and who answers it."""

    def __init__(
        self,
        request_codec: Codec[Any],
        response_codec: Codec[Any],
        handle: Callable[[Any, Deadline], Awaitable[Any]],
        admission: Admission,
        handle_now: Callable[[Any], Any] | None = None,
        data_port: DataPort | None = None,
    ) -> None:
        """`handle_now` may answer a request at once, without waiting for anything; None from it
        leaves the request to `handle`. At `data_port` callers may open data connections."""
        self.request_codec = request_codec
        self.response_codec = response_codec
        self.handle = handle
        self.handle_now = handle_now
        self.admission = admission
        self.data_port = data_port


class _Frame:
    """One request that is arriving or being answered."""

    __slots__ = ("borrowed", "deadline", "outbox", "pending", "size", "task", "timer")

    def __init__(
        self,
        outbox: Outbox,
        pending: Pending[Any],
        deadline: Deadline,
        size: int,
        borrowed: Borrowed | None,
    ) -> None:
        self.outbox = outbox  # of the way that it came: its answer goes back on it
        self.pending = pending
        self.borrowed = borrowed
        self.deadline = deadline
        self.size = size
        self.task: asyncio.Task[None] | None = None  # once every chunk is here
        self.timer: Timer | None = None  # where there is a deadline


class ServedFrames:
    """Takes a stream's messages, whichever way they come, and puts each frame's answer into the
    outbox of the way that it came.

    Used from one event loop. A frame counts as in flight until its answer has been written.
    """

    def __init__(
        self,
        protocol: FrameProtocol,
        borrower: Borrower | None,
        deadline: Deadline,
        group: asyncio.TaskGroup,
    ) -> None:
        """`borrower` reads what the caller lends, if it does; `deadline` is the whole stream's;
        frames that have to wait are answered by tasks of `group`."""
        self._protocol = protocol
        self._borrower = borrower
        self._deadline = deadline
        self._group = group
        self._frames: dict[int, _Frame] = {}
        self._borrowed: dict[int, Borrowed] = {}  # of frames that ended, until they are returned
        self._answered = asyncio.Event()
        self._timers = Timers()
        self._loop = asyncio.get_running_loop()

    def take(self, buffer: Buffer, outbox: Outbox) -> None:
        """One message; `outbox` leads back where it came from. Raises InvalidRequestError for what
        cannot be read, which ends the stream."""
        message = frames.decode(buffer)
        if isinstance(message, frames.Start):
            self._begin(buffer, message, outbox)
        elif isinstance(message, frames.Chunk):
            self._continue(buffer, message, outbox)
        elif isinstance(message, frames.End):
            self._cancel(message.frame_id)

    def place(self, head: memoryview, length: int, outbox: Outbox) -> Place | None:
        """Where a chunk's elements belong: they are read there, and need not be copied. What is
        called then raises as `take` does."""
        chunk = frames.chunk_at(head, length)
        frame = self._frames.get(chunk.frame_id) if chunk is not None else None
        if chunk is None or frame is None or frame.task is not None or frame.outbox is not outbox:
            return None
        size = chunk.end - chunk.at
        room = frame.pending.hidden_states.room(size)
        if room is None:
            return None
        return Place(chunk.at, room, partial(self._placed, chunk.frame_id, frame, size))

    def _placed(self, frame_id: int, frame: _Frame, size: int) -> None:
        if self._frames.get(frame_id) is frame:  # else it was given up meanwhile
            frame.pending.hidden_states.written(size)
            self._start_if_complete(frame_id, frame)

    def refuse_incomplete(self) -> None:
        """No more messages come, but answers are waited for."""
        # Not in the reader: a cancelled task keeps its locals until the collector runs, and a frame
        # among them would keep a dead caller's memory.
        for frame_id, frame in list(self._frames.items()):
            if frame.task is None:
                self._refuse(frame_id, _INCOMPLETE, frame.outbox)

    async def all_answered(self) -> None:
        """Returns once every frame has its answer, which may still wait in an outbox."""
        while self._frames:
            self._answered.clear()
            await self._answered.wait()

    def close(self) -> None:
        """Gives every frame up, and the caller's memory. No more messages come."""
        for frame_id in list(self._frames):
            self._cancel(frame_id)
        self._timers.close()
        self._borrower = None

    def _begin(self, buffer: Buffer, message: frames.Start, outbox: Outbox) -> None:
        if message.frame_id in self._frames:
            raise InvalidRequestError(
                f"frame_id {message.frame_id} is in flight already: every frame needs its own",
                field="frame_id",
            )
        admission = self._protocol.admission
        borrowed = None
        if message.takes_credit:
            outbox.put(_NO_FRAME, iter((frames.encode_credit(*admission.credit),)))
        try:
            pending = self._protocol.request_codec.decode(
                buffer, message.at, message.end, admission.max_request_bytes
            )
            if message.blocks is not None:
                borrower = borrowing.require(self._borrower)
                borrowed = borrower.borrow(message.blocks, pending.hidden_states)
            size = pending.hidden_states.total
            admission.enter(size)
        except MeshError as error:
            self._refuse(message.frame_id, error, outbox)
            if message.blocks is not None and self._borrower is not None:
                self._give_back(message.frame_id, borrowed, outbox)
            return
        deadline = self._deadline
        if message.timeout_us:
            deadline = Deadline(min(deadline.at, Deadline.after(message.timeout_us / 1e6).at))
        frame = self._frames[message.frame_id] = _Frame(outbox, pending, deadline, size, borrowed)
        if deadline.timeout is not None:
            expire = partial(self._expire, message.frame_id)
            frame.timer = self._timers.after(deadline.timeout, expire)
        self._start_if_complete(message.frame_id, frame)

    def _continue(self, buffer: Buffer, message: frames.Chunk, outbox: Outbox) -> None:
        frame = self._frames.get(message.frame_id)
        if frame is None:
            return  # refused or given up while its chunks were on their way
        try:
            if frame.outbox is not outbox:
                raise InvalidRequestError("a chunk came another way than the frame began")
            if frame.task is not None:
                raise InvalidRequestError("a chunk came after its tensor was complete")
            frame.pending.hidden_states.append(buffer, message.at, message.end)
        except InvalidRequestError as error:
            self._refuse(message.frame_id, error, frame.outbox)
            return
        self._start_if_complete(message.frame_id, frame)

    def _start_if_complete(self, frame_id: int, frame: _Frame) -> None:
        if not frame.pending.hidden_states.complete:
            return
        request = _request(frame)
        if not self._answered_now(frame_id, frame, request):
            frame.task = self._group.create_task(self._answer(frame_id, frame, request))

    def _expire(self, frame_id: int) -> None:
        frame = self._frames[frame_id]
        self._refuse(frame_id, _LATE if frame.task is None else UNANSWERED, frame.outbox)

    def _refuse(self, frame_id: int, error: MeshError, outbox: Outbox) -> None:
        self._protocol.admission.ended(error.reason)
        frame = self._give_up(frame_id)
        outbox.put(frame_id, iter((frames.encode_error(frame_id, error),)))
        if frame is not None and frame.borrowed is not None:
            self._give_back(frame_id, frame.borrowed, outbox)

    def _cancel(self, frame_id: int) -> None:
        if frame_id in self._frames:
            self._protocol.admission.ended(CancelledRequestError.reason)
        frame = self._give_up(frame_id)
        if frame is not None and frame.borrowed is not None:
            self._give_back(frame_id, frame.borrowed, frame.outbox)

    def _give_back(self, frame_id: int, borrowed: Borrowed | None, outbox: Outbox) -> None:
        """Returns a frame's blocks to the caller as soon as nothing here uses them."""
        if borrowed is None:
            self._returned(frame_id, outbox)
            return
        self._borrowed[frame_id] = borrowed
        borrowed.give_back(partial(_call_on, self._loop, self._returned, frame_id, outbox))

    def _returned(self, frame_id: int, outbox: Outbox) -> None:
        self._borrowed.pop(frame_id, None)
        outbox.put(frame_id, iter((frames.encode_returned(frame_id),)))

    def _give_up(self, frame_id: int) -> _Frame | None:
        frame = self._frames.pop(frame_id, None)
        if frame is None:
            return None
        self._protocol.admission.leave(frame.size)
        frame.outbox.discard(frame_id)
        self._answered.set()
        if frame.timer is not None:
            frame.timer.cancel()
        if frame.task is not None:
            frame.task.cancel()
            frame.task = None  # the task holds the frame: neither would go before the collector ran
        return frame

    def _answered_now(self, frame_id: int, frame: _Frame, request: Any) -> bool:
        """Whether the request could be answered at once: then no task is made for it."""
        protocol = self._protocol
        if protocol.handle_now is None:
            return False
        try:
            response = protocol.handle_now(request)
            if response is None:
                return False
            copy = _copy_to_caller(frame, response.hidden_states)
            if copy is not None:
                copy()
            self._send(frame_id, frame, response, shared=copy is not None)
        except Exception as failure:
            self._send_error(frame_id, frame, failure)
        return True

    async def _answer(self, frame_id: int, frame: _Frame, request: Any) -> None:
        response: Any = None
        copy: Callable[[], object] | None = None
        try:
            response = await answer(self._protocol.handle, request, frame.deadline)
            copy = _copy_to_caller(frame, response.hidden_states)
            if copy is not None:
                if response.hidden_states.nbytes < _LARGE_BYTES or copy is _nothing:
                    copy()
                else:
                    await self._loop.run_in_executor(None, copy)
            self._send(frame_id, frame, response, shared=copy is not None)
        except asyncio.CancelledError as cancelled:
            forget(cancelled)
            raise
        except Exception as failure:
            self._send_error(frame_id, frame, failure)
        finally:
            # A task that was cancelled keeps its error, and with it what is at hand here.
            request = response = copy = None

    def _send(self, frame_id: int, frame: _Frame, response: Any, *, shared: bool) -> None:
        codec = self._protocol.response_codec
        if shared:
            whole = frames.encode_by_reference(codec, response, frame_id)
            messages: Iterator[Message] = iter((whole,))
        else:
            messages = frames.encode(codec, response, frame_id)
        self._end(frame_id, frame, messages, OK, shared)

    def _send_error(self, frame_id: int, frame: _Frame, failure: Exception) -> None:
        error = failure if isinstance(failure, MeshError) else internal(failure)
        messages = iter((frames.encode_error(frame_id, error),))
        reason = error.reason
        forget(failure)
        del error, failure
        self._end(frame_id, frame, messages, reason)

    def _end(
        self,
        frame_id: int,
        frame: _Frame,
        messages: Iterator[Message],
        outcome: str,
        shared: bool = False,
    ) -> None:
        """Queues the last messages of a frame, unless it was given up meanwhile."""
        if self._frames.pop(frame_id, None) is None:
            return
        if frame.timer is not None:
            frame.timer.cancel()
        admission = self._protocol.admission
        admission.ended(outcome)
        frame.outbox.put(frame_id, messages, partial(admission.leave, frame.size))
        if frame.borrowed is not None and not shared:
            self._give_back(frame_id, frame.borrowed, frame.outbox)
        self._answered.set()


def _request(frame: _Frame) -> Any:
    """The whole request, with room for its answer where the caller lends some."""
    request = frame.pending.finish()
    request.room = frame.borrowed
    return request


def _copy_to_caller(frame: _Frame, output: torch.Tensor) -> Callable[[], object] | None:
    """What puts an answer's elements into the caller's memory; None where they do not fit there."""
    room = frame.borrowed.room if frame.borrowed is not None else None
    if room is None or output.nbytes > room.nbytes:
        return None
    if output.data_ptr() == room.ctypes.data and output.is_contiguous():
        return _nothing  # it was written there in the first place
    if output.nbytes < _LARGE_BYTES:
        return partial(_copy_bytes, room, output)
    into = torch.from_numpy(room[: output.nbytes]).view(output.dtype).view(output.shape)
    return partial(into.copy_, output)


def _copy_bytes(room: Bytes, output: torch.Tensor) -> None:
    room.data[: output.nbytes] = tensors.payload(output)


def _nothing() -> None:
    pass


def _call_on(
    loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object
) -> None:
    """Calls on a loop from any thread; once the loop is closed, nobody waits for it."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)
