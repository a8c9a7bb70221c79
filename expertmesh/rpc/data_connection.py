"""A TCP connection that carries the messages of one stream, beside the gRPC call that opened it.

The messages are those of the stream, each with its length before it. What HTTP/2 does for them,
gRPC's threads and its copies take half the time of a round trip of 1 MiB
(benchmarks/bench_stream.py). Who may connect, and whether anybody does, is agreed on the stream:
`data_port.py`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from expertmesh.codec.frames import Message
from expertmesh.codec.wire import Buffer
from expertmesh.rpc.outbox import Outbox

_log = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
#: What is read at once of small messages; what does not fit goes to memory of its own.
_READ_BYTES = 64 << 10
_CLOSE_S = 0.5  # for what was sent to leave, where the peer still takes it
#: A peer that is gone without a word is noticed as gRPC's own pings would, and one that takes
#: nothing of what was sent to it does not hold its place here for ever.
_SOCKET_OPTIONS = (
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 20),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 2),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 60_000),
)

Take = Callable[[Buffer], None]


class Place(NamedTuple):
    """Where the rest of a message shall be read to."""

    skipped: int  # bytes of the message that nobody wants
    memory: memoryview  # for all that follow
    filled: Callable[[], None]  # called when they are there, instead of `on_message`


class DataConnection(asyncio.BufferedProtocol):
    """One end of the connection. Used from one event loop.

    What is put into `outbox` is sent. `on_message` is given each message that comes: bytes, or a
    view of memory that nobody else has. `place` is given the first bytes of a large one, and its
    length, and may say where the rest belongs. Neither raises anything. `on_lost` is called once,
    unless this end has closed the connection.
    """

    def __init__(self, max_message_bytes: int) -> None:
        """A peer that announces a longer message is cut off."""
        self.max_message_bytes = max_message_bytes
        self.outbox = Outbox(self._send_queued)
        self.on_message: Take = _ignore
        self.place: Callable[[memoryview, int], Place | None] = _nowhere
        self.on_lost: Callable[[], None] = _nothing
        self.lost = False
        self._transport: Any = None
        self._gathers = False  # whether the transport takes a message in parts
        self._unwanted = False  # aborted before it was there
        self._writable = False
        self._reading = True
        self._read = memoryview(bytearray(_READ_BYTES))
        self._filled = 0  # bytes of `_read` that are here and not yet taken
        self._large: memoryview | None = None  # a message that does not fit there, or its place
        self._placed: Callable[[], None] | None = None
        self._large_filled = 0
        self._closing: asyncio.TimerHandle | None = None

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        self._transport = transport
        # asyncio joins them too, or forgets to say when it is full (3.12, 3.13).
        self._gathers = type(transport).__module__.startswith("uvloop")
        _set_options(transport.get_extra_info("socket"))
        # What the kernel does not take at once waits in its frame, not in a buffer of the
        # transport, where it could be neither dropped nor overtaken.
        self._transport.set_write_buffer_limits(high=0)
        if self._unwanted:
            self._transport.abort()
            return
        self.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        if self._large is not None:
            return self._large[self._large_filled :]
        return self._read[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        if self._large is None:
            self._take_read(self._filled + nbytes)
            return
        self._large_filled += nbytes
        if self._large_filled == len(self._large):
            message, self._large = self._large, None
            placed, self._placed = self._placed, None
            if placed is not None:
                placed()
            else:
                self.on_message(message)

    def _take_read(self, filled: int) -> None:
        """Hands on every message in the first bytes of `_read`; keeps what has begun."""
        read, at = self._read, 0
        while filled - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(read, at)
            start = at + _LENGTH.size
            if length > self.max_message_bytes:
                _log.warning("a peer announced a message of %d bytes: cut off", length)
                self.abort()
                return
            if length > filled - start:
                if length > _READ_BYTES - _LENGTH.size:
                    self._begin_large(length, read[start:filled])
                    return
                break
            at = start + length
            self.on_message(bytes(read[start:at]))
        self._filled = filled - at
        if at and self._filled:
            read[: self._filled] = bytes(read[at:filled])

    def _begin_large(self, length: int, begun: memoryview) -> None:
        self._filled = 0
        place = self.place(begun, length)
        if place is not None:
            begun, self._large, self._placed = begun[place.skipped :], place.memory, place.filled
        else:
            self._large = np.empty(length, np.uint8).data
        self._large_filled = len(begun)
        self._large[: len(begun)] = begun

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._writable = False

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._writable = True
        self._send_queued()

    def eof_received(self) -> None:
        """See asyncio.BufferedProtocol: the connection closes, and is lost."""
        self._writable = False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        on_lost = self.on_lost
        self.let_go()
        self._transport = None
        if self._closing is not None:
            self._closing.cancel()
        on_lost()

    # What the stream calls.

    def let_go(self) -> None:
        """Takes and sends no more messages, and keeps nothing; what was sent may still arrive."""
        self.lost = True
        self._writable = False
        self.on_lost = _nothing
        self._take_no_more()
        self.outbox.stop()

    def _take_no_more(self) -> None:
        self.on_message, self.place = _ignore, _nowhere
        self._large = self._placed = None

    def _send_queued(self) -> None:
        """Sends for as long as the kernel takes it."""
        try:
            while self._writable and not self._transport.is_closing():
                message = self.outbox.take()
                if message is None:
                    break
                self._send(message)
        except Exception:  # a bug of ours ends the connection, so that another is opened
            _log.exception("a message could not be sent")
            self.abort()
        if not self._reading and not self.outbox.full and not self.lost:
            self._reading = True
            self._transport.resume_reading()

    def _send(self, message: Message) -> None:
        if isinstance(message, bytes):
            self._transport.write(_LENGTH.pack(len(message)) + message)
            return
        parts: list[Buffer] = [_LENGTH.pack(sum(map(len, message)))]
        parts += [part for part in message if part]
        if self._gathers:
            self._transport.writelines(parts)
        else:
            self._transport.write(b"".join(parts))

    def read_no_further(self) -> None:
        """Stops reading until the outbox has room again."""
        if self._reading and not self.lost:
            self._reading = False
            self._transport.pause_reading()

    def close(self) -> None:
        """Lets go, and ends the connection."""
        self.let_go()
        if self._transport is not None and self._closing is None:
            self._transport.close()
            loop = asyncio.get_running_loop()
            self._closing = loop.call_later(_CLOSE_S, self._transport.abort)

    def abort(self) -> None:
        """Ends the connection now; whoever uses it learns that it is lost."""
        self._unwanted = True
        self._writable = False
        self._take_no_more()
        if self._transport is not None:
            self._transport.abort()


def _set_options(sock: socket.socket | None) -> None:
    """Sets those that this system knows."""
    for level, name, value in _SOCKET_OPTIONS:
        number = getattr(socket, name, None)
        if sock is not None and number is not None:
            with suppress(OSError):
                sock.setsockopt(level, number, value)


def _ignore(_: Buffer) -> None:
    pass


def _nothing() -> None:
    pass


def _nowhere(_: memoryview, __: int) -> None:
    pass
