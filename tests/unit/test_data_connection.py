"""One end of a data connection: messages in any pieces, and a peer that takes them slowly."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import weakref
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.rpc.data_connection import DataConnection

_LARGE = 70_000  # does not fit in what is read at once


class _Transport:
    """Takes what is written; says when it is full, as the kernel would."""

    def __init__(self, connection: DataConnection, takes: float = float("inf")) -> None:
        self._connection = connection
        self.takes = takes  # messages until it is full
        self.written: list[bytes] = []
        self.reading = True
        self.aborted = False

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int) -> None:
        assert high == 0

    def write(self, data: bytes) -> None:
        self.writelines((data,))

    def writelines(self, parts: Any) -> None:
        self.written.append(b"".join(parts))
        if len(self.written) >= self.takes:
            self._connection.pause_writing()

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


def connected(takes: float = float("inf"), limit: int = 1 << 30) -> tuple[DataConnection, Any]:
    connection = DataConnection(limit)
    transport = _Transport(connection, takes)
    connection.connection_made(transport)  # type: ignore[arg-type]
    return connection, transport


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in messages)


def feed(connection: DataConnection, data: bytes, cuts: list[int]) -> None:
    """Reads the data in pieces, each as long as the next cut and as there is room."""
    at = turn = 0
    while at < len(data):
        room = connection.get_buffer(-1)
        assert len(room) > 0
        size = min(len(room), cuts[turn % len(cuts)], len(data) - at)
        room[:size] = data[at : at + size]
        connection.buffer_updated(size)
        at, turn = at + size, turn + 1


@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 4000, 65_531, 65_532, 65_533, _LARGE]), max_size=8),
    cuts=st.lists(st.sampled_from([1, 2, 3, 7, 1000, 65_536, 1 << 20]), min_size=1, max_size=4),
)
def test_messages_come_whole_and_in_order_however_they_are_cut(sizes, cuts) -> None:
    if max(cuts) < 1000:
        cuts = [*cuts, 1 << 20]  # byte by byte takes long
    messages = [bytes((index * 31 + at) % 251 for at in range(size % 300)) * (size // 300 + 1)
                for index, size in enumerate(sizes)]  # fmt: skip
    messages = [message[:size] for message, size in zip(messages, sizes, strict=True)]
    connection, _ = connected()
    got: list[bytes] = []
    connection.on_message = lambda message: got.append(bytes(message))

    feed(connection, framed(*messages), cuts)

    assert got == messages


def test_what_was_handed_out_is_not_written_to_again() -> None:
    connection, _ = connected()
    got: list[Any] = []
    connection.on_message = got.append

    feed(connection, framed(b"a" * 10, b"b" * _LARGE, b"c" * 10, b"d" * _LARGE), [1 << 20])

    assert [bytes(each) for each in got] == [b"a" * 10, b"b" * _LARGE, b"c" * 10, b"d" * _LARGE]


def test_a_peer_that_announces_too_much_is_cut_off() -> None:
    connection, transport = connected(limit=100)
    got: list[Any] = []
    connection.on_message = got.append

    feed(connection, framed(b"fits", b"x" * 101), [1 << 20])

    assert (got, transport.aborted) == ([b"fits"], True)


def test_frames_take_turns_while_the_peer_is_slow() -> None:
    connection, transport = connected(takes=1)

    connection.outbox.put(1, iter((b"large 1", b"large 2", b"large 3")))
    connection.outbox.put(2, iter((b"small",)))
    for _ in range(4):
        connection.resume_writing()

    assert transport.written == [framed(each) for each in (b"large 1", b"large 2", b"small",
                                                           b"large 3")]  # fmt: skip


def test_a_frame_that_is_dropped_is_not_sent_any_further() -> None:
    connection, transport = connected(takes=1)
    dropped: list[str] = []

    connection.outbox.put(1, iter((b"first", b"second")), lambda: dropped.append("one"))
    connection.outbox.discard(1)
    connection.resume_writing()

    assert transport.written == [framed(b"first")]
    assert dropped == ["one"]


@pytest.mark.parametrize("gathers", [False, True])
def test_parts_are_one_message_whether_they_are_joined_or_not(gathers: bool) -> None:
    connection, transport = connected()
    connection._gathers = gathers

    connection.outbox.put(1, iter(((b"head", memoryview(b"x" * _LARGE), b"tail"),)))
    connection.outbox.put(2, iter(((b"head", memoryview(b""), b""),)))

    assert transport.written == [framed(b"head" + b"x" * _LARGE + b"tail"), framed(b"head")]


def test_nothing_more_is_sent_or_taken_once_it_is_aborted() -> None:
    connection, transport = connected()
    got: list[bytes] = []

    def take(message: bytes | memoryview) -> None:
        got.append(bytes(message))
        connection.abort()

    connection.on_message = take

    feed(connection, framed(b"one", b"two"), [1 << 20])
    connection.outbox.put(1, iter((b"late",)))

    assert got == [b"one"]
    assert transport.written == []


def test_a_lost_connection_and_what_it_had_begun_to_read_die_without_the_collector() -> None:
    connection, _ = connected()
    feed(connection, struct.pack("<I", 10 << 20) + b"x" * _LARGE, [1 << 20])
    assert connection._large is not None
    memory = weakref.ref(connection._large.obj)
    whole = weakref.ref(connection)
    gc.disable()
    try:
        connection.connection_lost(None)
        del connection, _
        assert (memory(), whole()) == (None, None)
    finally:
        gc.enable()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_peer_that_reads_nothing_is_sent_little_and_then_everything(run: Any) -> None:
    """On both loops, whose transports differ."""

    async def scenario() -> tuple[int, int, int]:
        loop = asyncio.get_running_loop()
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        accepting = asyncio.ensure_future(loop.sock_accept(listening))
        ours = DataConnection(1 << 20)
        await loop.create_connection(lambda: ours, *listening.getsockname())
        peer, _ = await accepting
        sent: list[int] = []
        part = memoryview(bytes(1 << 20))
        for index in range(64):
            ours.outbox.put(index, iter(((b"head", part, b""),)), lambda: sent.append(1))
        early = len(sent)
        total = 0
        peer.setblocking(False)
        while total < 64 * ((1 << 20) + 8):
            total += len(await loop.sock_recv(peer, 1 << 20))
        await ours.outbox.written()
        ours.close()
        peer.close()
        listening.close()
        return early, len(sent), total

    early, late, total = run(scenario())

    assert early < 32
    assert (late, total) == (64, 64 * ((1 << 20) + 8))


def test_nothing_is_read_while_answers_pile_up() -> None:
    connection, transport = connected(takes=0)
    connection.pause_writing()

    for index in range(2000):
        connection.outbox.put(index, iter((b"answer",)))
    assert connection.outbox.full
    connection.read_no_further()
    assert not transport.reading
    transport.takes = float("inf")
    connection.resume_writing()

    assert len(transport.written) == 2000
    assert transport.reading


def test_what_cannot_be_sent_ends_the_connection(caplog) -> None:
    connection, transport = connected()

    connection.outbox.put(1, iter((3,)))  # type: ignore[arg-type]

    assert transport.aborted
    assert "a message could not be sent" in caplog.text


def test_a_lost_connection_says_so_once_and_drops_what_was_queued() -> None:
    connection, _ = connected(takes=0)
    connection.pause_writing()
    told: list[str] = []
    connection.on_lost = lambda: told.append("lost")
    connection.outbox.put(1, iter((b"never sent",)), lambda: told.append("dropped"))

    connection.connection_lost(None)
    connection.connection_lost(None)

    assert told == ["dropped", "lost"]
    assert connection.lost


def test_who_closes_a_connection_is_not_told_that_it_is_lost() -> None:
    async def scenario() -> list[str]:
        loop, told = asyncio.get_running_loop(), []
        lost = asyncio.Event()

        def other_end_lost() -> None:
            told.append("the other end")
            lost.set()

        def accept() -> DataConnection:
            other = DataConnection(1 << 20)
            other.on_lost = other_end_lost
            other.on_message = lambda message: told.append(bytes(message).decode())
            return other

        server = await loop.create_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        ours = DataConnection(1 << 20)
        await loop.create_connection(lambda: ours, "127.0.0.1", port)
        ours.on_lost = lambda: told.append("this end")
        ours.outbox.put(1, iter((b"the last words",)))
        ours.close()
        async with asyncio.timeout(5.0):
            await lost.wait()
        server.close()
        return told

    assert asyncio.run(scenario()) == ["the last words", "the other end"]
