"""Payloads in shared memory, or in messages where none is to be had: the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

import expertmesh
from expertmesh.codec import frames
from expertmesh.codec.frames import CHUNK_BYTES
from expertmesh.codec.messages import EXECUTE_RESPONSE, ExecuteRequest, ExecuteResponse
from expertmesh.config import RpcConfig, SharedMemoryConfig
from expertmesh.rpc import arena as arenas
from expertmesh.rpc import loop
from expertmesh.rpc.arena import HEADER_BYTES, Arena
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.lending import LEAST_BYTES, Lender
from expertmesh.rpc.stream import FrameStream
from expertmesh.v1 import tensor_pb2
from tests.mesh import wait_until
from tests.rows import CLOSE, H, execute_request, rows, truth
from tests.shared_memory import client as client
from tests.shared_memory import every_block_comes_back as every_block_comes_back
from tests.shared_memory import mesh as mesh
from tests.shared_memory import share, with_handler, with_stream
from tests.wire import admission

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
        answer = await stream.call(execute_request(torch.zeros(2, H)), Deadline.after(5.0))
        await stream._call.initial_metadata()
        await asyncio.sleep(0)
        return stream.transport, len(answer.hidden_states)

    assert loop.run(with_stream(old, act)) == ("grpc", 2)


def _answer_of(count: int) -> bytes:
    response = ExecuteResponse(hidden_states=torch.zeros(count, H))
    return frames.joined(next(frames.encode(EXECUTE_RESPONSE, response, 1)))


async def _double(request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
    return ExecuteResponse(hidden_states=request.hidden_states * 2)


def test_a_server_may_be_told_to_take_no_offers() -> None:
    async def act(stream: FrameStream) -> str:
        await stream.call(execute_request(torch.zeros(300, H)), Deadline.after(5.0))
        assert stream._lender is not None
        return stream._lender.refused

    refused = loop.run(with_handler(_double, act, RpcConfig(max_shared_bytes=0)))

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
