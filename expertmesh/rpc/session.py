"""The answering end of a frame stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import grpc.aio
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
    UnavailableError,
)
from expertmesh.rpc import borrowing, data_port, status
from expertmesh.rpc.admission import OK, Admission
from expertmesh.rpc.answering import UNANSWERED, answer, forget, internal
from expertmesh.rpc.arena import Bytes
from expertmesh.rpc.borrowing import Borrowed, Borrower
from expertmesh.rpc.data_connection import DataConnection, Place
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


class FrameSession:
    """Serves one stream until the client ends it.

    A frame counts as in flight until its answer has been written: a client that does not read its
    answers finds the server full, and is not read any further itself.
    """

    def __init__(
        self, context: grpc.aio.ServicerContext[Any, Any], protocol: FrameProtocol
    ) -> None:
        self._context = context
        self._protocol = protocol
        self._frames: dict[int, _Frame] = {}
        self._borrower: Borrower | None = None
        self._borrowed: dict[int, Borrowed] = {}  # of frames that ended, until they are returned
        self._outbox = Outbox()
        self._connection: DataConnection | None = None
        self._connection_used = False  # whether anything has come on it
        self._group: asyncio.TaskGroup | None = None
        self._failed: asyncio.Future[MeshError] = asyncio.get_running_loop().create_future()
        self._answered = asyncio.Event()
        self._timers = Timers()
        self._stream_deadline = Deadline.after(context.time_remaining())
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Reads frames and answers them; a stream that cannot be read is aborted."""
        admission = self._protocol.admission
        self._borrower, metadata = borrowing.take_offer(
            self._context.invocation_metadata(), admission.max_shared_bytes
        )
        port = self._protocol.data_port
        if port is not None:
            metadata += port.answer(self._context.invocation_metadata(), self._attach)
        admission.shared_streams += self._borrower is not None
        try:
            await self._run(metadata)
        finally:
            # After the status, which says more of the end than a closed connection does.
            if self._connection is not None:
                self._connection.close()
            admission.shared_streams -= self._borrower is not None
            self._borrower = None  # what still views the memory keeps it, and nothing else

    def _attach(self, connection: DataConnection) -> None:
        """Takes frames from a data connection, too."""
        connection.on_message, connection.on_lost = self._take_data, self._lost_data
        connection.place = self._place
        self._connection = connection
        data_port.welcome(connection)

    def _take_data(self, buffer: Buffer) -> None:
        connection = self._connection
        assert connection is not None
        self._connection_used = True
        self._guarded(self._take, buffer, connection.outbox)
        if connection.outbox.full:
            connection.read_no_further()

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        """What cannot be read ends the stream; so does a bug of ours."""
        try:
            call(*arguments)
        except InvalidRequestError as error:
            self._fail(error)
        except Exception as error:
            self._fail(internal(error))

    def _place(self, head: memoryview, length: int) -> Place | None:
        """Where a chunk's elements belong: they are read there, and need not be copied."""
        chunk = frames.chunk_at(head, length)
        frame = self._frames.get(chunk.frame_id) if chunk is not None else None
        if chunk is None or frame is None or frame.task is not None:
            return None
        if self._connection is None or frame.outbox is not self._connection.outbox:
            return None
        size = chunk.end - chunk.at
        room = frame.pending.hidden_states.room(size)
        if room is None:
            return None
        return Place(chunk.at, room, partial(self._placed, chunk.frame_id, frame, size))

    def _placed(self, frame_id: int, frame: _Frame, size: int) -> None:
        if self._frames.get(frame_id) is frame:  # else it was given up meanwhile
            frame.pending.hidden_states.written(size)
            self._guarded(self._start_if_complete, frame_id, frame)

    def _lost_data(self) -> None:
        if self._connection_used:
            self._fail(UnavailableError("the data connection was lost"))
        else:  # its caller did not wait for it, and sends everything on the stream
            self._connection = None

    def _fail(self, error: MeshError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)

    async def _run(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        error: MeshError | None = None
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                if metadata:  # before anything is written, which would send other metadata
                    await self._send_metadata(metadata)
                error = await self._until_the_end(group)
            finally:
                self._group = None
                if self._protocol.data_port is not None:
                    self._protocol.data_port.forget(self._attach)
                if self._connection is not None:
                    self._connection.let_go()
                for frame_id in list(self._frames):
                    self._cancel(frame_id)
                self._timers.close()
                self._outbox.clear()
        if error is not None:
            await self._context.abort_with_status(status.to_status(error))

    async def _until_the_end(self, group: asyncio.TaskGroup) -> MeshError | None:
        """Reads and writes until the stream or its data connection ends; why, if by an error."""
        streams = self._protocol.admission.streams
        writer = group.create_task(self._outbox.run(self._write))
        reader = group.create_task(self._read_all())
        streams.add(reader)
        try:
            ends = (reader, self._failed)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            streams.discard(reader)
            reader.cancel()
            writer.cancel()
        if self._failed.done():
            return self._failed.result()
        return None if reader.cancelled() else reader.result()

    async def _send_metadata(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        try:
            await self._context.send_initial_metadata(metadata)
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError):
            raise asyncio.CancelledError from None  # the client has gone

    async def _write(self, message: bytes) -> None:
        try:
            await self._context.write(message)
        except (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError):
            raise asyncio.CancelledError from None  # the client has gone

    async def _read_all(self) -> MeshError | None:
        """Reads until the client ends the stream; returns why it cannot be read any further."""
        while (buffer := await self._context.read()) is not grpc.aio.EOF:
            try:
                self._take(buffer, self._outbox)
            except InvalidRequestError as error:
                return error
            if self._outbox.full:
                await self._outbox.room()
        self._refuse_incomplete()
        while self._frames:  # the client sends no more, but waits for its answers
            self._answered.clear()
            await self._answered.wait()
        await self._outbox.written()
        if self._connection is not None:
            await self._connection.outbox.written()
        return None

    def _refuse_incomplete(self) -> None:
        # Apart, as a cancelled reader keeps its locals until the collector runs: a frame among them
        # would keep a dead caller's memory.
        for frame_id, frame in list(self._frames.items()):
            if frame.task is None:
                self._refuse(frame_id, _INCOMPLETE, frame.outbox)

    def _take(self, buffer: Buffer, outbox: Outbox) -> None:
        message = frames.decode(buffer)
        if isinstance(message, frames.Start):
            self._begin(buffer, message, outbox)
        elif isinstance(message, frames.Chunk):
            self._continue(buffer, message, outbox)
        elif isinstance(message, frames.End):
            self._cancel(message.frame_id)

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
        deadline = self._stream_deadline
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
            assert self._group is not None
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
