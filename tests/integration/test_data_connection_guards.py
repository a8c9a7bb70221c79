"""Data connections are guarded from strangers, garbage and frames that change their way."""

from __future__ import annotations

import asyncio
import socket
import struct

import grpc
import pytest
import torch

import expertmesh
from expertmesh.rpc import data_port, loop
from expertmesh.v1 import router_pb2, tensor_pb2
from tests.data_connections import checkpoint as checkpoint
from tests.data_connections import connect, stream_of
from tests.data_connections import mesh as mesh
from tests.data_connections import method as method
from tests.data_connections import raw as raw
from tests.mesh import wait_until
from tests.rows import CLOSE, rows, truth
from tests.wire import RawConnection, admission, chunk, details, floats, forward


def ends(connection: socket.socket) -> bool:
    """Whether the other end closes it without a word."""
    connection.settimeout(5.0)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_wrong_token_is_refused_and_the_stream_goes_on(mesh, method) -> None:
    wrong = RawConnection(method, router_pb2.ForwardStreamResponse, token=bytes(16))

    assert ends(wrong.socket)

    wrong.socket.close()
    wrong.socket = socket.create_connection(("127.0.0.1", wrong.answer.port), 5.0)
    wrong.send(tensor_pb2.DataConnectionHello(token=wrong.answer.token))
    assert wrong._read() == b""  # the welcome
    wrong.send(forward(1, rows(2), 1))
    torch.testing.assert_close(
        floats(wrong.receive().forward.hidden_states), truth(mesh, 1, rows(2)), **CLOSE
    )
    wrong.close()


def test_a_token_is_good_for_one_connection(raw) -> None:
    with socket.create_connection(("127.0.0.1", raw.answer.port), 5.0) as second:
        hello = b"\x0a\x10" + raw.answer.token
        second.sendall(struct.pack("<I", len(hello)) + hello)

        assert ends(second)


def test_the_token_of_a_stream_that_has_ended_is_worth_nothing(mesh, method) -> None:
    first = RawConnection(method, router_pb2.ForwardStreamResponse, token=bytes(16))
    first.close()
    port = mesh.routers[0]._server._data_port
    wait_until(lambda: first.answer.token not in port._expected, 5.0, "forgotten")
    with socket.create_connection(("127.0.0.1", first.answer.port), 5.0) as late:
        hello = b"\x0a\x10" + first.answer.token
        late.sendall(struct.pack("<I", len(hello)) + hello)

        assert ends(late)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, struct.pack("<I", 3) + b"\xff\xff\xff"]
)
def test_a_stranger_is_cut_off(mesh, said) -> None:
    port = mesh.routers[0]._server._data_port
    with socket.create_connection(("127.0.0.1", port.port), 5.0) as stranger:
        stranger.sendall(said)

        assert ends(stranger)
    wait_until(lambda: not port._strangers, 5.0, "gone")


def test_a_stranger_who_says_nothing_is_cut_off(mesh, monkeypatch) -> None:
    monkeypatch.setattr(data_port, "_HELLO_S", 0.05)
    port = mesh.routers[0]._server._data_port
    with socket.create_connection(("127.0.0.1", port.port), 5.0) as stranger:
        assert ends(stranger)


def test_no_more_strangers_than_a_few_are_kept(mesh, monkeypatch) -> None:
    monkeypatch.setattr(data_port, "_MAX_STRANGERS", 2)
    port = mesh.routers[0]._server._data_port
    kept = [socket.create_connection(("127.0.0.1", port.port), 5.0) for _ in range(2)]
    wait_until(lambda: len(port._strangers) == 2, 5.0, "kept")
    with socket.create_connection(("127.0.0.1", port.port), 5.0) as another:
        assert ends(another)
    for each in kept:
        each.close()
    wait_until(lambda: not port._strangers, 5.0, "gone")


def test_garbage_ends_its_stream_and_no_other(mesh, raw) -> None:
    client = connect(mesh)

    raw.send_bytes(b"\xff\xff\xff\xff")

    assert ends(raw.socket)
    with pytest.raises(grpc.RpcError) as caught:
        next(raw.call)
    assert details(caught.value)[0] == "INVALID_REQUEST"
    torch.testing.assert_close(
        loop.run(client.forward(rows(2), 1)), truth(mesh, 1, rows(2)), **CLOSE
    )
    loop.run(client.close())


def test_a_message_that_is_too_long_ends_its_stream(mesh, raw) -> None:
    raw.send(forward(1, rows(2), 1))
    assert raw.receive().frame_id == 1
    raw.socket.sendall(struct.pack("<I", (1 << 32) - 1))

    assert ends(raw.socket)
    with pytest.raises(grpc.RpcError) as caught:
        next(raw.call)
    assert details(caught.value)[0] == "UNAVAILABLE"


def test_a_frame_that_fails_is_answered_and_the_connection_goes_on(mesh, raw) -> None:
    raw.send(forward(99, rows(2), 1), forward(1, rows(2), 2))

    by_id = {message.frame_id: message for message in (raw.receive(), raw.receive())}
    assert by_id[1].error.reason == "UNKNOWN_LAYER"
    torch.testing.assert_close(
        floats(by_id[2].forward.hidden_states), truth(mesh, 1, rows(2)), **CLOSE
    )


def test_a_frame_may_follow_the_token_at_once(mesh, method) -> None:
    for frame_id in range(1, 51):
        hello = RawConnection(method, router_pb2.ForwardStreamResponse, waits=False)
        hello.send(forward(1, rows(2), frame_id))

        assert hello._read() == b""
        assert hello.receive().frame_id == frame_id
        hello.close()


@pytest.mark.parametrize("first", ["grpc", "tcp"])
def test_a_frame_that_goes_on_another_way_is_refused(mesh, raw, first) -> None:
    hidden = rows(4)
    begin, more = forward(1, hidden, 7, length=100), chunk(7, hidden.numpy().tobytes()[100:])
    ways = [raw.send_on_call, raw.send]
    if first == "tcp":
        ways.reverse()
    receive = (lambda: next(raw.call)) if first == "grpc" else raw.receive

    ways[0](begin)
    wait_until(lambda: admission(mesh.routers[0]).frames == 1, 5.0, "begun")
    ways[1](more)
    error = receive().error

    assert error.reason == "INVALID_REQUEST"
    assert "another way" in error.message


def test_a_stream_that_cannot_be_read_ends_with_its_status(mesh) -> None:
    client = connect(mesh)
    stream = stream_of(client)
    loop.run(client.forward(rows(2), 1))

    async def garbage() -> expertmesh.MeshError:
        assert stream._connection is not None
        stream._connection.outbox.put(99, iter((b"\xff\xff",)))
        async with asyncio.timeout(5.0):
            return await asyncio.shield(stream.broken)

    assert type(loop.run(garbage())) is expertmesh.InvalidRequestError
    loop.run(client.close())
