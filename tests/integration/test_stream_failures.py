"""Streams that fail: an end does not read, answers absurdly or not at all, or cannot write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

import expertmesh
from expertmesh.codec import frames, tensors, wire
from expertmesh.codec.messages import (
    EXECUTE_REQUEST,
    EXECUTE_RESPONSE,
    ExecuteRequest,
    ExecuteResponse,
)
from expertmesh.config import RpcConfig
from expertmesh.errors import DeadlineError, InternalError
from expertmesh.rpc import loop
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.served_frames import FrameProtocol
from expertmesh.rpc.session import FrameSession
from expertmesh.rpc.stream import FrameStream
from expertmesh.v1 import expert_pb2
from tests.mesh import LocalMesh
from tests.rows import execute_request, rows
from tests.streams import mesh as mesh
from tests.streams import nothing_stays_in_flight as nothing_stays_in_flight


class _Context:
    """A gRPC context whose client sends what it is given and reads when it is let."""

    def __init__(self, incoming: list[bytes]) -> None:
        self._incoming = incoming
        self.reads, self.ended = asyncio.Event(), asyncio.Event()
        self.written: list[bytes] = []

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def read(self) -> Any:
        await asyncio.sleep(0)
        if self._incoming:
            return self._incoming.pop(0)
        self.ended.set()
        return grpc.aio.EOF

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        self.written.append(message)


async def _echo(request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
    return ExecuteResponse(hidden_states=request.hidden_states)


def test_answers_that_a_client_does_not_read_keep_its_place_taken() -> None:
    """Else the server would hold them without limit."""

    async def scenario() -> tuple[int, int, Admission, list[bytes]]:
        limits = Admission(RpcConfig(max_inflight_frames=2))
        sent = [
            frames.joined(next(frames.encode(EXECUTE_REQUEST, execute_request(rows(2)), i)))
            for i in range(5)
        ]
        context = _Context(sent)
        protocol = FrameProtocol(EXECUTE_REQUEST, EXECUTE_RESPONSE, _echo, limits)
        session = asyncio.ensure_future(FrameSession(context, protocol).run())  # type: ignore[arg-type]
        await context.ended.wait()
        unread = limits.frames, limits.bytes
        context.reads.set()
        await session
        return *unread, limits, context.written

    unread, held, limits, written = loop.run(scenario())

    assert (unread, held) == (2, 2 * rows(2).nbytes)
    assert (limits.frames, limits.bytes) == (0, 0)
    replies = [expert_pb2.ExecuteStreamResponse.FromString(message) for message in written]
    refused = {reply.frame_id for reply in replies if reply.error.reason == "QUEUE_FULL"}
    assert len(replies) == 5
    assert refused == {2, 3, 4}


Handler = Callable[[Any, Any], Awaitable[None]]


async def _against(handler: Handler, act: Callable[[FrameStream], Awaitable[Any]]) -> Any:
    """Runs `act` with a stream to a server that answers as `handler` does."""
    server = grpc.aio.server()
    method = grpc.stream_stream_rpc_method_handler(handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.X", {"S": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = open_channel(f"127.0.0.1:{port}")
    stream = FrameStream(channel, "/x.X/S", EXECUTE_REQUEST, EXECUTE_RESPONSE, "a bad server")
    try:
        return await act(stream)
    finally:
        await stream.close()
        await channel.close()
        await server.stop(None)


ABSURD = {
    "a shape beyond the request's": wire.field_varint(1, 1)
    + wire.field_bytes(2, wire.field_bytes(1, b"\x08\x01\x12\x04" + wire.varint(1 << 26))),
    "garbage": b"\xff\xff\xff\xff",
    "more chunks than elements": b"".join(
        (
            wire.field_varint(1, 1),
            wire.field_bytes(2, tensors.header(rows(2), 1, 0)[0]),
        )
    ),
}


@pytest.mark.parametrize("answer", ABSURD.values(), ids=ABSURD)
def test_an_answer_that_cannot_be_read_fails_the_request_at_once(answer) -> None:
    async def handler(_: Any, context: Any) -> None:
        await context.read()
        await context.write(answer)
        too_much = wire.field_bytes(1, bytes(513))
        await context.write(wire.field_varint(1, 1) + wire.field_bytes(3, too_much))
        await context.read()

    async def act(stream: FrameStream) -> None:
        await stream.call(execute_request(rows(2)), Deadline.after(10.0))

    with pytest.raises(InternalError, match="a bad server sent an answer that cannot be read"):
        loop.run(_against(handler, act))


def test_a_silent_server_costs_a_request_its_deadline_and_no_more() -> None:
    got: list[frames.Start | frames.Chunk | frames.End] = []

    async def handler(_: Any, context: Any) -> None:
        while (buffer := await context.read()) is not grpc.aio.EOF:
            got.append(frames.decode(buffer))
            if isinstance(got[-1], frames.End):
                return

    async def act(stream: FrameStream) -> int:
        with pytest.raises(DeadlineError, match="allow more time"):
            await stream.call(execute_request(rows(2)), Deadline.after(0.05))
        await stream.broken
        return stream.in_flight

    assert loop.run(_against(handler, act)) == 0
    assert [type(message) for message in got] == [frames.Start, frames.End]


def test_a_request_that_cannot_be_encoded_fails_alone(mesh: LocalMesh) -> None:
    with expertmesh.connect(mesh.address) as client:
        hidden = torch.randn(2, client.describe().hidden_size)
        expected = client.forward(hidden, 1)
        with pytest.raises(expertmesh.InvalidRequestError):
            client.forward(hidden, 1.5, timeout=1.0)  # type: ignore[arg-type]

        torch.testing.assert_close(client.forward(hidden, 1, timeout=5.0), expected)


def test_a_stream_whose_writer_fails_is_opened_anew(
    mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    with expertmesh.connect(mesh.address) as client:
        hidden = torch.randn(300, client.describe().hidden_size)
        expected = client.forward(hidden, 1)
        monkeypatch.setattr(frames, "encode_cancel", lambda frame_id: "not bytes")
        with pytest.raises(expertmesh.MeshError):
            client.forward(hidden, 1, timeout=1e-4)  # its cancel message cannot be written

        torch.testing.assert_close(client.forward(hidden, 1, timeout=5.0), expected)


def test_a_closed_connection_says_so(mesh: LocalMesh) -> None:
    client = expertmesh.connect(mesh.address)
    hidden = torch.randn(2, client.describe().hidden_size)
    client.close()

    for call in (lambda: client.forward(hidden, 1), client.load, client.status):
        with pytest.raises(expertmesh.UnavailableError, match="closed"):
            call()
    client.close()
