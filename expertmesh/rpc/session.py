"""The answering end of a frame stream: the ways that its messages come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio

from expertmesh.codec.wire import Buffer
from expertmesh.errors import InvalidRequestError, MeshError, UnavailableError
from expertmesh.rpc import borrowing, data_port, status
from expertmesh.rpc.answering import internal
from expertmesh.rpc.borrowing import Borrower
from expertmesh.rpc.data_connection import DataConnection, Place
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.outbox import Outbox
from expertmesh.rpc.served_frames import FrameProtocol, ServedFrames


class FrameSession:
    """Serves one stream until the client ends it: over the gRPC call, and over a data connection
    beside it where the client opens one.

    A client that does not read its answers finds the server full, and is not read any further
    itself.
    """

    def __init__(
        self, context: grpc.aio.ServicerContext[Any, Any], protocol: FrameProtocol
    ) -> None:
        self._context = context
        self._protocol = protocol
        self._deadline = Deadline.after(context.time_remaining())
        self._borrower: Borrower | None = None
        self._outbox = Outbox()
        self._connection: DataConnection | None = None
        self._connection_used = False  # whether anything has come on it
        self._frames: ServedFrames | None = None  # while the stream is served
        self._failed: asyncio.Future[MeshError] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Reads frames and answers them; a stream that cannot be read is aborted."""
        admission, port = self._protocol.admission, self._protocol.data_port
        offered = self._context.invocation_metadata()
        self._borrower, metadata = borrowing.take_offer(offered, admission.max_shared_bytes)
        if port is not None:
            metadata += port.answer(offered, self._attach)
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
        served, connection = self._frames, self._connection
        assert served is not None
        assert connection is not None
        self._connection_used = True
        self._guarded(served.take, buffer, connection.outbox)
        if connection.outbox.full:
            connection.read_no_further()

    def _place(self, head: memoryview, length: int) -> Place | None:
        """See `DataConnection.place`."""
        served, connection = self._frames, self._connection
        assert served is not None
        assert connection is not None
        place = served.place(head, length, connection.outbox)
        if place is None:
            return None
        return place._replace(filled=partial(self._guarded, place.filled))

    def _guarded(self, call: Callable[..., None], *arguments: Any) -> None:
        """What cannot be read ends the stream; so does a bug of ours."""
        try:
            call(*arguments)
        except InvalidRequestError as error:
            self._fail(error)
        except Exception as error:
            self._fail(internal(error))

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
            served = ServedFrames(self._protocol, self._borrower, self._deadline, group)
            self._frames = served
            try:
                if metadata:  # before anything is written, which would send other metadata
                    await self._send_metadata(metadata)
                error = await self._until_the_end(served, group)
            finally:
                if self._protocol.data_port is not None:
                    self._protocol.data_port.forget(self._attach)
                if self._connection is not None:
                    self._connection.let_go()
                served.close()
                self._outbox.clear()
        if error is not None:
            await self._context.abort_with_status(status.to_status(error))

    async def _until_the_end(
        self, served: ServedFrames, group: asyncio.TaskGroup
    ) -> MeshError | None:
        """Reads and writes until the stream or its data connection ends; why, if by an error."""
        streams = self._protocol.admission.streams
        writer = group.create_task(self._outbox.run(self._write))
        reader = group.create_task(self._read_all(served))
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

    async def _read_all(self, served: ServedFrames) -> MeshError | None:
        """Reads until the client ends the stream; returns why it cannot be read any further."""
        while (buffer := await self._context.read()) is not grpc.aio.EOF:
            try:
                served.take(buffer, self._outbox)
            except InvalidRequestError as error:
                return error
            if self._outbox.full:
                await self._outbox.room()
        served.refuse_incomplete()
        await served.all_answered()  # the client sends no more, but waits for its answers
        await self._outbox.written()
        if self._connection is not None:
            await self._connection.outbox.written()
        return None
