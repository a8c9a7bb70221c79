"""The calling end of a frame stream: many requests in flight, answers in any order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Generic

import grpc
import grpc.aio

from expertmesh.codec import frames
from expertmesh.codec.frames import Message
from expertmesh.codec.messages import Codec, M, Pending
from expertmesh.codec.tensors import TensorPart
from expertmesh.codec.wire import Buffer
from expertmesh.errors import (
    DeadlineError,
    InternalError,
    InvalidRequestError,
    MeshError,
    UnavailableError,
)
from expertmesh.rpc import data_port, status
from expertmesh.rpc.credit import CreditGate
from expertmesh.rpc.data_connection import DataConnection, Place
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.lending import Lender
from expertmesh.rpc.outbox import Outbox
from expertmesh.rpc.tasks import TaskSet
from expertmesh.rpc.timers import Timers

_log = logging.getLogger(__name__)
_STATUS_S = 0.25  # a stream whose data connection ends has its status so soon, if it has any


class _Waiter(Generic[M]):
    """One frame in flight."""

    __slots__ = ("arriving", "future", "max_bytes", "outbox")

    def __init__(self, future: asyncio.Future[M], max_bytes: int) -> None:
        self.future: asyncio.Future[M] = future
        self.max_bytes = max_bytes
        self.outbox: Outbox | None = None  # what it was sent through, once it was
        self.arriving: Pending[M] | None = None


class FrameStream:
    """One persistent bidirectional stream to one peer.

    Used from one event loop. Once broken it stays broken (`broken` holds why): open another.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        path: str,
        request_codec: Codec[Any],
        response_codec: Codec[Any],
        peer: str,
        lender: Lender | None = None,
        data_host: str = "",
    ) -> None:
        """With a `lender`, which the stream then owns, payloads go through its memory if the peer
        can open it. With a `data_host`, the one that the channel leads to, frames go over a data
        connection beside the call once there is one."""
        self._lender = lender
        metadata = lender.metadata() if lender is not None else ()
        metadata += data_port.offer() if data_host else ()
        self._call: Any = channel.stream_stream(path)(metadata=metadata)
        self._request_codec = request_codec
        self._response_codec = response_codec
        self._peer = peer
        self._waiters: dict[int, _Waiter[Any]] = {}
        self._last_id = 0
        self._outbox = Outbox()
        self._lane = self._outbox  # what frames are sent through from now on
        self._connection: DataConnection | None = None
        self._credit = CreditGate(self._send)
        self._tasks = TaskSet()
        self._timers = Timers()
        self._loop = asyncio.get_running_loop()
        #: When anything last came from the peer: time.monotonic(), 0 before.
        self.heard_at = 0.0
        self.broken: asyncio.Future[MeshError] = self._loop.create_future()
        self._tasks.spawn(self._write_all(), f"write {peer}")
        self._reading = self._tasks.spawn(self._read_all(), f"read {peer}")
        self._learning: asyncio.Task[None] | None = None
        if metadata:
            self._learning = self._tasks.spawn(self._learn(data_host), f"metadata of {peer}")

    async def _learn(self, data_host: str) -> None:
        """Frames that are sent before the peer has said what it knows go over the call."""
        try:
            metadata = await self._call.initial_metadata()
        except grpc.aio.AioRpcError:
            return  # the reader learns why
        if self._lender is not None:
            self._lender.learn(metadata)
        if not data_host:
            return
        connection = await data_port.connect(data_host, metadata)
        if connection is None:
            return
        if self.broken.done():
            connection.close()
            return
        connection.on_message, connection.on_lost = self._receive_data, self._lost_data
        connection.place = self._place
        self._connection, self._lane = connection, connection.outbox

    def _receive_data(self, buffer: Buffer) -> None:
        try:
            self._receive(buffer, self._lane)
        except MeshError as decode_error:
            self._break(self._unreadable(decode_error))
            self._call.cancel()
        except Exception as unexpected:
            self._fail(unexpected)

    def _place(self, head: memoryview, length: int) -> Place | None:
        """Where a chunk's elements belong: they are read there, and need not be copied."""
        chunk = frames.chunk_at(head, length)
        waiter = self._waiters.get(chunk.frame_id) if chunk is not None else None
        if chunk is None or waiter is None or waiter.arriving is None:
            return None
        if self._connection is None or waiter.outbox is not self._connection.outbox:
            return None
        part, size = waiter.arriving.hidden_states, chunk.end - chunk.at
        room = part.room(size)
        if room is None:
            return None
        return Place(chunk.at, room, partial(self._placed, chunk.frame_id, waiter, part, size))

    def _placed(self, frame_id: int, waiter: _Waiter[Any], part: TensorPart, size: int) -> None:
        self.heard_at = time.monotonic()
        part.written(size)
        if self._waiters.get(frame_id) is waiter:  # else it was given up meanwhile
            self._settle_if_complete(frame_id, waiter)

    def _lost_data(self) -> None:
        self._tasks.spawn(self._break_soon(), f"lost data connection to {self._peer}")

    async def _break_soon(self) -> None:
        """Ends the stream; with its status, if the peer has sent one."""
        await asyncio.wait((self._reading,), timeout=_STATUS_S)
        self._break(UnavailableError(f"the data connection to {self._peer} was lost"))
        self._call.cancel()

    def _send(self, frame_id: int, messages: Iterator[Message]) -> None:
        waiter = self._waiters.get(frame_id)
        if waiter is not None:  # else the stream has broken
            waiter.outbox = self._lane
            self._lane.put(frame_id, messages)

    @property
    def transport(self) -> str:
        """How frames travel: "grpc", in messages of the call; "tcp", on a data connection beside
        it; "shm", by either, with hidden states in shared memory."""
        if self._lender is not None and self._lender.accepted:
            return "shm"
        return "tcp" if self.has_connection else "grpc"

    async def settled(self) -> None:
        """Returns once it is known by which ways frames travel; they are sent meanwhile, too."""
        if self._learning is not None:
            await asyncio.wait((self._learning,))

    @property
    def has_connection(self) -> bool:
        """Whether frames go over a data connection from now on."""
        return self._connection is not None

    @property
    def in_flight(self) -> int:
        """Frames sent and not answered."""
        return len(self._waiters)

    async def call(self, request: Any, deadline: Deadline, traceparent: str = "") -> Any:
        """Sends one request and waits for its answer.

        Raises what the peer answered, UnavailableError when the stream breaks, DeadlineError.
        Cancelling it gives the frame up; the stream goes on.
        """
        future = self.begin(request, deadline, traceparent)
        if deadline.timeout is None:
            return await future
        timer = self._timers.after(deadline.timeout, partial(self._expire, future))
        try:
            return await future
        finally:
            timer.cancel()

    def begin(self, request: Any, deadline: Deadline, traceparent: str = "") -> asyncio.Future[Any]:
        """Sends one request; the future is its answer, or fails as `call` does.

        The peer is told the deadline, but nothing here ends at it: the caller waits as long as it
        likes. Cancelling the future gives the frame up; the stream goes on. Raises
        UnavailableError when the stream is broken already.
        """
        if self.broken.done():
            raise self._lost()
        self._last_id += 1
        frame_id = self._last_id
        messages = self._encode(request, frame_id, deadline.timeout_us, traceparent)
        future: asyncio.Future[Any] = self._loop.create_future()
        # An answer has the elements of what was asked for, float32 at the widest.
        self._waiters[frame_id] = _Waiter(future, 4 * request.hidden_states.numel())
        self._credit.put(frame_id, request.hidden_states.nbytes, messages)
        future.add_done_callback(lambda _: self._give_up(frame_id))
        return future

    def _encode(
        self, request: Any, frame_id: int, timeout_us: int, traceparent: str
    ) -> Iterator[Message]:
        lender, codec = self._lender, self._request_codec
        blocks = lender.lend(frame_id, request.hidden_states) if lender is not None else None
        if lender is None or blocks is None:
            return frames.encode(
                codec, request, frame_id, timeout_us, traceparent, takes_credit=frame_id == 1
            )
        try:
            message = frames.encode_by_reference(
                codec,
                request,
                frame_id,
                timeout_us,
                traceparent,
                blocks=blocks,
                takes_credit=frame_id == 1,
            )
        except BaseException:
            lender.returned(frame_id)
            raise
        return lender.sending(frame_id, message)

    def _give_up(self, frame_id: int) -> None:
        """Tells the peer when a frame was not settled by its answer."""
        unsettled = self._waiters.pop(frame_id, None)
        self._credit.done(frame_id)
        if unsettled is None or self.broken.done():
            return
        if unsettled.outbox is not None:
            unsettled.outbox.discard(frame_id)
            unsettled.outbox.put(frame_id, iter((frames.encode_cancel(frame_id),)))
        if self._lender is not None:
            self._lender.give_up(frame_id)

    def _expire(self, future: asyncio.Future[Any]) -> None:
        if not future.done():
            future.set_exception(
                DeadlineError(
                    f"{self._peer} did not answer before the deadline: allow more time, or send "
                    "fewer rows"
                )
            )

    def give_up(self, error: MeshError) -> None:
        """Frames in flight fail with that error, and the peer is told; the stream goes on."""
        for waiter in self._waiters.values():
            if not waiter.future.done():
                waiter.future.set_exception(error.again())
                waiter.future.exception()  # who waits sees it

    async def close(self) -> None:
        """Ends the stream; frames in flight fail with UnavailableError."""
        self._break(UnavailableError(f"the stream to {self._peer} was closed"))
        self._call.cancel()
        self._timers.close()
        await self._tasks.close()

    async def _write_all(self) -> None:
        try:
            await self._outbox.run(self._call.write)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader learns why
        except Exception as error:
            self._fail(error)

    async def _read_all(self) -> None:
        try:
            while (buffer := await self._call.read()) is not grpc.aio.EOF:
                self._receive(buffer, self._outbox)
            code, details = await self._call.code(), await self._call.details()
            error: MeshError = UnavailableError(
                f"{self._peer} ended the stream: {details or code.name}"
            )
        except grpc.aio.AioRpcError as rpc_error:
            error = status.from_call(rpc_error, self._peer)
            if not isinstance(error, InvalidRequestError):
                # However a connection or a peer dies (reset, cancelled, internal): the frames in
                # flight were not answered, and another peer may answer them.
                error = UnavailableError(error.message, retry_after_s=error.retry_after_s)
        except MeshError as decode_error:
            error = self._unreadable(decode_error)
            self._call.cancel()
        except Exception as unexpected:
            self._fail(unexpected)
            return
        self._break(error)

    def _unreadable(self, error: MeshError) -> MeshError:
        return InternalError(f"{self._peer} sent an answer that cannot be read: {error.message}")

    def _fail(self, error: Exception) -> None:
        """A bug of ours ends the stream, so that another is opened, and is logged."""
        _log.error("the stream to %s failed", self._peer, exc_info=error)
        self._break(UnavailableError(f"the stream to {self._peer} failed: see the log"))
        self._call.cancel()

    def _receive(self, buffer: Buffer, lane: Outbox) -> None:
        self.heard_at = time.monotonic()
        message = frames.decode(buffer)
        if isinstance(message, frames.Credit):
            self._credit.grant(message.frames, message.bytes)
            return
        waiter = self._waiters.get(message.frame_id)
        if isinstance(message, frames.Returned) or (waiter is None and _is_shared(message)):
            if self._lender is not None:
                self._lender.returned(message.frame_id)
            return
        if waiter is None:
            return  # given up; the answer was on its way
        if waiter.outbox is not lane:
            raise InvalidRequestError("an answer came another way than its request went")
        if isinstance(message, frames.End):
            self._settle(message.frame_id, frames.decode_error(buffer, message.at, message.end))
            return
        if isinstance(message, frames.Start):
            waiter.arriving = self._response_codec.decode(
                buffer, message.at, message.end, waiter.max_bytes
            )
            if message.shared:
                self._fill(message.frame_id, waiter.arriving.hidden_states)
        elif waiter.arriving is not None:
            waiter.arriving.hidden_states.append(buffer, message.at, message.end)
        self._settle_if_complete(message.frame_id, waiter)

    def _settle_if_complete(self, frame_id: int, waiter: _Waiter[Any]) -> None:
        if waiter.arriving is not None and waiter.arriving.hidden_states.complete:
            self._settle(frame_id, waiter.arriving.finish())

    def _fill(self, frame_id: int, part: TensorPart) -> None:
        if self._lender is None:
            raise InvalidRequestError("an answer lies in shared memory, but none is shared")
        self._lender.fill(frame_id, part)

    def _settle(self, frame_id: int, outcome: Any) -> None:
        future = self._waiters.pop(frame_id).future
        if future.done():
            return
        if isinstance(outcome, MeshError):
            future.set_exception(outcome)
            future.exception()  # who waits sees it; who has gone is not missed
        else:
            future.set_result(outcome)

    def _break(self, error: MeshError) -> None:
        if self.broken.done():
            return
        self.broken.set_result(error)
        if self._lender is not None:
            self._lender.close()
        if self._connection is not None:
            self._connection.close()
        for frame_id in list(self._waiters):
            self._settle(frame_id, self._lost())

    def _lost(self) -> MeshError:
        return self.broken.result().again()


def _is_shared(message: frames.Start | frames.Chunk | frames.End) -> bool:
    return isinstance(message, frames.Start) and message.shared
