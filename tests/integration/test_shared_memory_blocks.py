"""Blocks of shared memory come back, and are nobody else's until then."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import expertmesh
from expertmesh.codec import frames
from expertmesh.codec.messages import EXECUTE_RESPONSE, ExecuteRequest, ExecuteResponse
from expertmesh.errors import DeadlineError, InvalidRequestError, MeshError, OverloadedError
from expertmesh.rpc import arena as arenas
from expertmesh.rpc import lending, loop
from expertmesh.rpc.arena import HEADER_BYTES, Arena
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.lending import METADATA_KEY, Lender
from expertmesh.rpc.stream import FrameStream
from expertmesh.v1 import router_pb2_grpc, tensor_pb2
from tests.mesh import LocalMesh, wait_until
from tests.rows import CLOSE, H, execute_request, rows, truth
from tests.shared_memory import AUTO, router_lenders, share, with_handler, with_stream
from tests.shared_memory import client as client
from tests.shared_memory import every_block_comes_back as every_block_comes_back
from tests.shared_memory import mesh as mesh
from tests.wire import RawStream, admission, channel_to, devices_held, forward

# Blocks that a frame leaves behind.


def test_blocks_of_a_cancelled_frame_come_back_when_the_device_has_let_them_go(
    mesh, client
) -> None:
    lender = share(client)

    with devices_held(mesh):
        call = loop.submit(client.forward(rows(300), 1))
        wait_until(lambda: all(admission(s).frames for s in mesh.servers), 5.0, "forwarded")
        call.cancel()
        wait_until(lambda: not any(admission(s).frames for s in mesh.servers), 5.0, "told")
        held = [each.lent_bytes for each in router_lenders(mesh)]
    wait_until(lambda: lender.lent_bytes == 0, 5.0, "returned to the client")
    wait_until(
        lambda: not any(each.lent_bytes for each in router_lenders(mesh)), 5.0, "to the router"
    )

    assert all(held)  # the device threads had not come to them yet


def test_blocks_of_a_frame_that_expires_come_back(mesh, client) -> None:
    lender = share(client)

    with devices_held(mesh), pytest.raises(DeadlineError):
        loop.run(client.forward(rows(300), 1, timeout=0.1))
    wait_until(lambda: lender.lent_bytes == 0, 5.0, "returned")


def test_blocks_of_a_frame_that_was_refused_come_back(mesh, client) -> None:
    lender = share(client)

    with pytest.raises(InvalidRequestError):
        loop.run(client.forward(torch.randn(300, H + 1), 1))
    with pytest.raises(InvalidRequestError, match="hold nan"):
        loop.run(client.forward(rows(300) / 0.0 * 0.0, 1))

    wait_until(lambda: lender.lent_bytes == 0, 5.0, "returned")


def test_blocks_of_a_frame_that_found_no_place_come_back(mesh, client, monkeypatch) -> None:
    lender, limits = share(client), admission(mesh.routers[0])

    def full(size: int) -> None:
        raise OverloadedError("full", retry_after_s=0.1)

    monkeypatch.setattr(limits, "enter", full)
    with pytest.raises(OverloadedError):
        loop.run(client.forward(rows(300), 1))

    wait_until(lambda: lender.lent_bytes == 0, 5.0, "returned")


@pytest.mark.parametrize("sent", [False, True], ids=["not-sent", "sent"])
def test_only_blocks_that_the_peer_never_heard_of_are_free_when_a_frame_is_given_up(sent) -> None:
    async def scenario() -> int:
        lender = Lender(1 << 20, views=False)
        answer = tensor_pb2.SharedMemoryAnswer(accepted=True)
        lender.learn(((METADATA_KEY, answer.SerializeToString()),))
        assert lender.lend(7, torch.zeros(300, H)) is not None
        messages = lender.sending(7, b"the message")
        if sent:
            assert next(messages) == b"the message"
        lender.give_up(7)
        try:
            return lender.lent_bytes
        finally:
            lender.close()

    assert (loop.run(scenario()) > 0) == sent


def test_pages_go_back_to_the_system_when_nothing_was_lent_for_a_while(mesh, monkeypatch) -> None:
    monkeypatch.setattr(lending, "_IDLE_S", 0.05)
    opened = loop.run(expertmesh.connect_async(mesh.address, shared_memory=AUTO))
    lender = share(opened)
    arena = lender._arena
    assert arena is not None
    hidden = rows(20_000)

    first = loop.run(opened.forward(hidden, 1))
    wait_until(lambda: lender._free.top == HEADER_BYTES, 5.0, "released")
    blocks = arenas.os.fstat(arena.fd).st_blocks
    second = loop.run(opened.forward(hidden, 1))

    assert 512 * blocks <= 2 * HEADER_BYTES
    torch.testing.assert_close(second, first, **CLOSE)
    loop.run(opened.close())


# References of foreign clients.


@pytest.fixture
def sharing(mesh: LocalMesh) -> Iterator[tuple[RawStream, Arena]]:
    arena = Arena(1 << 20)
    metadata = ((METADATA_KEY, arena.offer().SerializeToString()),)
    with channel_to(mesh.address) as channel:
        method = partial(
            router_pb2_grpc.RouterServiceStub(channel).ForwardStream, metadata=metadata
        )
        with RawStream(method) as stream:
            yield stream, arena
    arena.close()


def referring(frame_id: int, hidden: torch.Tensor, **blocks: int) -> Any:
    message = forward(1, hidden, frame_id, length=0)
    message.blocks.CopyFrom(tensor_pb2.SharedBlocks(**blocks))
    return message


def test_a_foreign_client_can_share_memory_by_the_contract(mesh, sharing) -> None:
    stream, arena = sharing
    hidden = rows(300)
    size = hidden.nbytes
    arena.view(HEADER_BYTES, size)[:] = hidden.view(torch.uint8).flatten().numpy()
    answer_at = HEADER_BYTES + size

    stream.send(
        referring(
            5, hidden, offset=HEADER_BYTES, length=size, answer_offset=answer_at, answer_length=size
        )
    )
    message = stream.receive()

    assert (message.frame_id, message.WhichOneof("kind"), message.shared) == (5, "forward", True)
    assert message.forward.hidden_states.data == b""
    answer = torch.from_numpy(arena.view(answer_at, size).copy()).view(torch.float32).view(300, H)
    torch.testing.assert_close(answer, truth(mesh, 1, hidden), **CLOSE)


def test_without_room_the_answer_comes_in_messages_and_the_blocks_come_back(mesh, sharing) -> None:
    stream, arena = sharing
    hidden = rows(10)
    arena.view(HEADER_BYTES, hidden.nbytes)[:] = hidden.view(torch.uint8).flatten().numpy()

    stream.send(referring(5, hidden, offset=HEADER_BYTES, length=hidden.nbytes))
    answer, returned = stream.receive(), stream.receive()

    assert not answer.shared
    assert len(answer.forward.hidden_states.data) == hidden.nbytes
    assert (returned.frame_id, returned.WhichOneof("kind")) == (5, "returned")


BAD = {
    "beyond-the-end": {"offset": 1 << 20, "length": 2560},
    "in-the-header": {"offset": 0, "length": 2560},
    "wrapping-around": {"offset": (1 << 64) - 64, "length": 2560},
    "unaligned": {"offset": HEADER_BYTES + 1, "length": 2560},
    "of-another-length": {"offset": HEADER_BYTES, "length": 2564},
    "answer-beyond-the-end": {
        "offset": HEADER_BYTES,
        "length": 2560,
        "answer_offset": (1 << 20) - 64,
        "answer_length": 2560,
    },
}


@pytest.mark.parametrize("blocks", BAD.values(), ids=BAD)
def test_a_reference_that_cannot_be_fails_its_frame_alone(mesh, sharing, blocks) -> None:
    stream, _ = sharing

    stream.send(referring(5, rows(10), **blocks))
    error, returned = stream.receive(), stream.receive()
    stream.send(forward(1, rows(10), 6))
    answer = stream.receive()

    assert error.error.reason == "INVALID_REQUEST"
    assert error.error.field.startswith("blocks.")
    assert (returned.frame_id, returned.WhichOneof("kind")) == (5, "returned")
    assert (answer.frame_id, answer.WhichOneof("kind")) == (6, "forward")


def test_a_reference_on_a_stream_that_shares_nothing_fails_its_frame_alone(mesh) -> None:
    with (
        channel_to(mesh.address) as channel,
        RawStream(router_pb2_grpc.RouterServiceStub(channel).ForwardStream) as stream,
    ):
        stream.send(referring(5, rows(10), offset=HEADER_BYTES, length=2560))
        error = stream.receive()
        stream.send(forward(1, rows(10), 6))
        answer = stream.receive()

    assert (error.error.reason, error.error.field) == ("INVALID_REQUEST", "blocks")
    assert answer.frame_id == 6


@pytest.mark.parametrize("offer", [b"\xff", b""], ids=["garbage", "empty"])
def test_an_offer_that_is_none_is_refused_and_the_stream_serves(mesh, offer) -> None:
    with channel_to(mesh.address) as channel:
        method = partial(
            router_pb2_grpc.RouterServiceStub(channel).ForwardStream,
            metadata=((METADATA_KEY, offer),),
        )
        with RawStream(method) as stream:
            stream.send(forward(1, rows(10), 6))
            assert stream.receive().frame_id == 6
            answers = dict(stream.call.initial_metadata())

    assert not tensor_pb2.SharedMemoryAnswer.FromString(answers[METADATA_KEY]).accepted


def test_an_answer_in_memory_that_was_never_lent_ends_the_stream(mesh) -> None:
    async def liar(_: Any, context: Any) -> None:
        await context.read()
        response = ExecuteResponse(hidden_states=torch.zeros(2, H))
        await context.write(frames.encode_by_reference(EXECUTE_RESPONSE, response, 1))
        await context.read()

    async def act(stream: FrameStream) -> None:
        await stream.call(execute_request(torch.zeros(2, H)), Deadline.after(5.0))

    with pytest.raises(MeshError, match="cannot be read"):
        loop.run(with_stream(liar, act))


# A storm of cancellations, against a handler that reads and writes long after.


async def _accepted(stream: FrameStream) -> None:
    await stream.settled()
    assert stream.transport == "shm"


class _Slow:
    """Computes on threads that nothing can stop, and checks that its rows keep still."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.changed: list[float] = []
        self.written = 0

    async def handle(self, request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
        pause_s = self._random.random() * 0.004
        output = await asyncio.to_thread(self._compute, request, pause_s)
        if self._random.random() < 0.2:
            raise OverloadedError("now and then", retry_after_s=0.1)
        return ExecuteResponse(hidden_states=output)

    def _compute(self, request: ExecuteRequest, pause_s: float) -> torch.Tensor:
        hidden, mark = request.hidden_states, float(request.hidden_states[0, 0])
        time.sleep(pause_s)
        if not bool((hidden == mark).all()):
            self.changed.append(mark)
        output: torch.Tensor = hidden * 2
        room = None if request.room is None else request.room.like(output)
        if room is not None:
            room.copy_(output)
            output = room
            self.written += 1
        return output


@pytest.mark.parametrize("views", [False, True], ids=["copied", "viewed"])
@pytest.mark.parametrize("seed", range(3))
def test_no_late_reader_or_writer_meets_a_block_of_another_frame(seed, views) -> None:
    slow, generator = _Slow(seed), random.Random(seed)
    outcomes = {"right": 0, "given up": 0, "late": 0, "failed": 0}

    async def ask(stream: FrameStream, mark: int) -> None:
        hidden = torch.full((generator.choice([70, 300, 1000]), H), float(mark))
        timeout = generator.choice([0.001, 0.003, 5.0, 5.0])
        call = asyncio.ensure_future(stream.call(execute_request(hidden), Deadline.after(timeout)))
        if generator.random() < 0.3:
            asyncio.get_running_loop().call_later(generator.random() * 0.006, call.cancel)
        try:
            answer = (await call).hidden_states
        except DeadlineError:
            outcomes["late"] += 1
        except OverloadedError:
            outcomes["failed"] += 1
        except asyncio.CancelledError:
            outcomes["given up"] += 1
        else:
            await asyncio.sleep(generator.random() * 0.003)
            assert answer.shape == hidden.shape
            assert bool((answer == 2 * mark).all()), mark
            outcomes["right"] += 1

    async def storm(stream: FrameStream) -> int:
        lender = stream._lender
        assert lender is not None
        await _accepted(stream)
        marks = iter(range(1, 401))

        async def repeat() -> None:
            for mark in marks:
                await ask(stream, mark)

        async with asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(repeat())
        async with asyncio.timeout(5.0):
            while lender._free.used:
                lender._collect()
                await asyncio.sleep(0.001)
        return lender.full

    # Room for about six frames: blocks are used again at once.
    loop.run(with_handler(slow.handle, storm, size=2 << 20, views=views))

    assert slow.changed == []
    assert slow.written
    assert min(outcomes.values()) > 0, outcomes
    assert sum(outcomes.values()) == 400
