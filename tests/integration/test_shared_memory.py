"""Payloads in shared memory: the same answers as over TCP, whatever is cancelled or refused."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch

import expertmesh
from expertmesh.codec import frames
from expertmesh.codec.frames import CHUNK_BYTES
from expertmesh.codec.messages import (
    EXECUTE_REQUEST,
    EXECUTE_RESPONSE,
    ExecuteRequest,
    ExecuteResponse,
)
from expertmesh.config import RouterConfig, RpcConfig, SharedMemoryConfig
from expertmesh.errors import DeadlineError, InvalidRequestError, MeshError, OverloadedError
from expertmesh.rpc import arena as arenas
from expertmesh.rpc import lending, loop
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.arena import HEADER_BYTES, Arena
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.lending import LEAST_BYTES, METADATA_KEY, Lender
from expertmesh.rpc.served_frames import FrameProtocol
from expertmesh.rpc.server import stream_tensor
from expertmesh.rpc.stream import FrameStream
from expertmesh.v1 import router_pb2_grpc, tensor_pb2
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.wire import RawStream, admission, channel_to, devices_held, forward, wait_until_idle

H = 64
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
AUTO = SharedMemoryConfig(mode="auto", size_bytes=64 << 20)
Sharing = expertmesh.client.AsyncMesh


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    with local_mesh(
        path, backend="reference", router_config=RouterConfig(shared_memory=AUTO)
    ) as cluster:
        cluster.model = model
        yield cluster


@pytest.fixture(autouse=True)
def every_block_comes_back(mesh: LocalMesh) -> Iterator[None]:
    yield
    wait_until_idle(mesh)
    gc.collect()  # answers that a failed test still has at hand
    wait_until(lambda: sum(each.lent_bytes for each in router_lenders(mesh)) == 0, 5.0, "returned")


@pytest.fixture
def client(mesh: LocalMesh) -> Iterator[Sharing]:
    opened = loop.run(expertmesh.connect_async(mesh.address, shared_memory=AUTO))
    share(opened)
    yield opened
    loop.run(opened.close())


def share(client: Sharing) -> Lender:
    """Opens the client's stream and waits until payloads go through shared memory."""
    (link,) = client._links.values()
    stream = loop.run(link.stream())
    wait_until(lambda: stream.transport == "shm", 5.0, "shared")
    lender = stream._lender
    assert lender is not None
    return lender


def router_lenders(mesh: LocalMesh) -> list[Lender]:
    """Of the router's streams to its servers; blocks whose views have died are free."""
    lenders = [link._stream._lender for _, link in mesh.routers[0].router.pool.links()]
    for lender in lenders:
        loop.run(_collected(lender))
    return lenders


async def _collected(lender: Lender) -> None:
    lender._collect()


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def truth(mesh: LocalMesh, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    assert mesh.model is not None
    with torch.no_grad():
        output: torch.Tensor = mesh.model.model.layers[layer].mlp(hidden[None])[0]
    return output


# The same answers.

# In rows of 256 bytes: none, one, around the least that is shared, and around one and two chunks.
EDGES = [
    0,
    1,
    LEAST_BYTES // 256 - 1,
    LEAST_BYTES // 256,
    LEAST_BYTES // 256 + 1,
    CHUNK_BYTES // 256 - 1,
    CHUNK_BYTES // 256,
    CHUNK_BYTES // 256 + 1,
    2 * CHUNK_BYTES // 256 + 1,
]


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
@pytest.mark.parametrize("count", EDGES)
def test_answers_are_those_of_the_model_at_every_size(mesh, client, count, layer) -> None:
    hidden = rows(count)

    answer = loop.run(client.forward(hidden, layer))

    torch.testing.assert_close(answer, truth(mesh, layer, hidden), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_is_answered_as_over_tcp(mesh, client, dtype) -> None:
    hidden = rows(500).to(dtype)
    ids = torch.arange(500 * 2).view(500, 2) % 8
    weights = torch.rand(500, 2, generator=torch.Generator().manual_seed(1))
    gated = {"expert_ids": ids, "expert_weights": weights}

    with expertmesh.connect(mesh.address) as tcp:
        expected = tcp.forward(hidden, 1, **gated)
    answer = loop.run(client.forward(hidden, 1, **gated))

    assert (answer.dtype, answer.shape) == (dtype, hidden.shape)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(answer, expected, **close)


def test_strided_rows_are_lent_row_major(mesh, client) -> None:
    for hidden in (rows(2 * 8000)[::2], rows(200)[::2], rows(H).t(), rows(1).expand(300, H)):
        answer = loop.run(client.forward(hidden, 1))
        torch.testing.assert_close(answer, truth(mesh, 1, hidden), **CLOSE)


def test_an_answer_belongs_to_the_caller_and_no_later_one_changes_it(mesh, client) -> None:
    first = loop.run(client.forward(rows(300, 1), 1))
    kept = first.clone()

    for seed in range(2, 8):
        loop.run(client.forward(rows(300, seed), 1))

    assert torch.equal(first, kept)


def test_both_hops_share_memory_and_status_says_so(mesh, client, monkeypatch) -> None:
    lent: list[int] = []
    lend = Lender.lend

    def note(self: Lender, frame_id: int, hidden: torch.Tensor) -> Any:
        blocks = lend(self, frame_id, hidden)
        lent.append(0 if blocks is None else blocks.length)
        return blocks

    monkeypatch.setattr(Lender, "lend", note)
    experts = client.describe().layers[1].num_experts
    ids = torch.arange(experts).expand(400, experts)  # every row to every server

    loop.run(client.forward(rows(400), 1, expert_ids=ids, expert_weights=torch.ones(ids.shape)))

    assert lent == [400 * 4 * H] * 3
    status = loop.run(client.status())
    assert [server.transport for server in status.servers] == ["shm", "shm"]
    assert admission(mesh.routers[0]).shared_streams == 1
    assert [admission(server).shared_streams for server in mesh.servers] == [1, 1]


def test_small_payloads_stay_in_their_message(mesh, client) -> None:
    lender = share(client)

    loop.run(client.forward(rows(LEAST_BYTES // (4 * H) - 1), 1))

    assert lender._free.top == HEADER_BYTES  # nothing was ever taken


def test_by_default_nothing_is_offered(mesh) -> None:
    with expertmesh.connect(mesh.address) as client:
        client.forward(rows(300), 1)
        (link,) = client._mesh._links.values()
        assert link._stream.transport != "shm"
        assert link._stream._lender is None


# Where nothing is proved, payloads go in messages.


def _offer(**fields: object) -> Callable[[pytest.MonkeyPatch], None]:
    """Makes arenas offer something else."""
    offer = Arena.offer

    def change(self: Arena) -> tensor_pb2.SharedMemoryOffer:
        made = offer(self)
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    return lambda monkeypatch: monkeypatch.setattr(Arena, "offer", change)


def _other_user(monkeypatch: pytest.MonkeyPatch) -> None:
    other = arenas.os.geteuid() + 1
    monkeypatch.setattr(arenas.os, "geteuid", lambda: other)


def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> int:
        raise OSError("none left")

    monkeypatch.setattr(arenas.os, "memfd_create", absent)


UNPROVED = {
    "another host": (_offer(boot_id="another"), "another host"),
    "another process namespace": (_offer(pid=1 << 22), "cannot be opened"),
    "another nonce": (_offer(nonce=bytes(32)), "another nonce"),
    "another user": (_other_user, "another user"),
    "no memfd": (_no_memory, "no memfd"),
}


@pytest.mark.parametrize(("change", "says"), UNPROVED.values(), ids=UNPROVED)
def test_peers_of_other_hosts_or_users_send_the_elements(mesh, change, says, monkeypatch) -> None:
    change(monkeypatch)
    hidden = rows(300)
    with expertmesh.connect(mesh.address, shared_memory="auto") as client:
        first = client.forward(hidden, 1)
        (link,) = client._mesh._links.values()
        lender = link._stream._lender
        wait_until(lambda: lender.refused, 5.0, "refused")
        second = client.forward(hidden, 1)

        assert says in lender.refused
        assert link._stream.transport != "shm"
        assert lender.lent_bytes == 0
    for answer in (first, second):
        torch.testing.assert_close(answer, truth(mesh, 1, hidden), **CLOSE)


def test_a_server_that_knows_nothing_of_offers_is_used_over_grpc() -> None:
    async def old(_: Any, context: Any) -> None:
        while (await context.read()) is not grpc.aio.EOF:
            await context.write(_answer_of(2))

    async def act(stream: FrameStream) -> tuple[str, int]:
        answer = await stream.call(_execute(torch.zeros(2, H)), Deadline.after(5.0))
        await stream._call.initial_metadata()
        await asyncio.sleep(0)
        return stream.transport, len(answer.hidden_states)

    assert loop.run(_with_stream(old, act)) == ("grpc", 2)


def _answer_of(count: int) -> bytes:
    response = ExecuteResponse(hidden_states=torch.zeros(count, H))
    return frames.joined(next(frames.encode(EXECUTE_RESPONSE, response, 1)))


def test_a_server_may_be_told_to_take_no_offers() -> None:
    async def act(stream: FrameStream) -> str:
        await stream.call(_execute(torch.zeros(300, H)), Deadline.after(5.0))
        assert stream._lender is not None
        return stream._lender.refused

    refused = loop.run(_with_handler(_double, act, RpcConfig(max_shared_bytes=0)))

    assert "at most 0" in refused


def test_a_full_arena_sends_frames_over_tcp_and_lends_again_later(mesh) -> None:
    small = SharedMemoryConfig(mode="auto", size_bytes=1 << 20)
    opened = loop.run(expertmesh.connect_async(mesh.address, shared_memory=small))
    lender = share(opened)
    hidden = rows(1200)  # 300 KiB and as much for the answer: one fits at a time

    async def ask() -> list[torch.Tensor]:
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(opened.forward(hidden, 1)) for _ in range(6)]
        return [call.result() for call in calls]

    answers = loop.run(ask())
    full = lender.full
    later = loop.run(opened.forward(hidden, 1))

    for answer in (*answers, later):
        torch.testing.assert_close(answer, truth(mesh, 1, hidden), **CLOSE)
    assert (full, lender.full) == (5, 5)
    loop.run(opened.close())


def test_a_request_larger_than_the_arena_goes_over_tcp(mesh) -> None:
    small = SharedMemoryConfig(mode="auto", size_bytes=1 << 20)
    opened = loop.run(expertmesh.connect_async(mesh.address, shared_memory=small))
    lender = share(opened)
    hidden = rows(5000)

    answer = loop.run(opened.forward(hidden, 1))

    torch.testing.assert_close(answer, truth(mesh, 1, hidden), **CLOSE)
    assert lender.full == 1
    loop.run(opened.close())


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
        await stream.call(_execute(torch.zeros(2, H)), Deadline.after(5.0))

    with pytest.raises(MeshError, match="cannot be read"):
        loop.run(_with_stream(liar, act))


# A storm of cancellations, against a handler that reads and writes long after.


def _execute(hidden: torch.Tensor) -> ExecuteRequest:
    return ExecuteRequest(
        layer=1,
        hidden_states=hidden,
        expert_ids=np.zeros((len(hidden), 1), np.int32),
        expert_weights=np.ones((len(hidden), 1), np.float32),
    )


async def _double(request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
    return ExecuteResponse(hidden_states=request.hidden_states * 2)


@asynccontextmanager
async def _serving(method: Any) -> AsyncIterator[int]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.X", {"S": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


Act = Callable[[FrameStream], Awaitable[Any]]


async def _with_stream(
    serve: Any, act: Act, *, size: int = 4 << 20, views: bool = False, method: Any = None
) -> Any:
    """Runs `act` with a stream that offers memory to a server that does as `serve` does."""
    method = method or grpc.stream_stream_rpc_method_handler(serve)
    async with _serving(method) as port:
        channel = open_channel(f"127.0.0.1:{port}")
        lender = Lender(size, views=views)
        stream = FrameStream(
            channel, "/x.X/S", EXECUTE_REQUEST, EXECUTE_RESPONSE, "a server", lender
        )
        try:
            return await act(stream)
        finally:
            await stream.close()
            await channel.close()


async def _with_handler(
    handle: Any, act: Act, config: RpcConfig | None = None, **options: Any
) -> Any:
    limits = Admission(config or RpcConfig())
    protocol = FrameProtocol(EXECUTE_REQUEST, EXECUTE_RESPONSE, handle, limits)
    return await _with_stream(None, act, method=stream_tensor(protocol), **options)


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
        call = asyncio.ensure_future(stream.call(_execute(hidden), Deadline.after(timeout)))
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
    loop.run(_with_handler(slow.handle, storm, size=2 << 20, views=views))

    assert slow.changed == []
    assert slow.written
    assert min(outcomes.values()) > 0, outcomes
    assert sum(outcomes.values()) == 400
