"""Credit over real gRPC: who keeps to it waits, who does not is refused, who ignores it works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import expertmesh
from expertmesh.config import RpcConfig
from expertmesh.rpc import loop
from expertmesh.v1 import router_pb2_grpc
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.rows import rows
from tests.wire import (
    RawStream,
    admission,
    channel_to,
    devices_held,
    floats,
    forward,
    wait_until_idle,
)

MOE = 1
SMALL = RpcConfig(host="127.0.0.1", drain_s=1.0, max_inflight_frames=6)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    with local_mesh(path, router_rpc=SMALL, backend="reference") as cluster:
        yield cluster


def test_a_client_that_keeps_to_its_credit_is_never_told_that_the_queue_is_full(mesh) -> None:
    before = admission(mesh.routers[0]).outcomes["QUEUE_FULL"]
    with expertmesh.connect(mesh.address) as client:
        wanted = [client.forward(rows(2, seed), MOE) for seed in range(40)]  # hears the credit
        with devices_held(mesh):
            calls = [loop.submit(client._mesh.forward(rows(2, s), MOE)) for s in range(40)]
            wait_until(lambda: admission(mesh.routers[0]).frames == 3, 5.0, "full")
            (link,) = client._mesh._links.values()
            wait_until(lambda: link.in_flight == 40, 5.0, "all waiting")
            calls[1].cancel()  # one that is under way
            calls[20].cancel()  # one that waits for credit
        kept = [index for index in range(40) if index not in (1, 20)]
        answers = {index: calls[index].result(20.0) for index in kept}

    assert admission(mesh.routers[0]).outcomes["QUEUE_FULL"] == before
    for index, answer in answers.items():
        torch.testing.assert_close(answer, wanted[index], rtol=1e-5, atol=1e-5)
    wait_until_idle(mesh)


def test_a_client_that_ignores_its_credit_is_refused_when_the_server_is_full(mesh) -> None:
    with (
        channel_to(mesh.address) as channel,
        RawStream(router_pb2_grpc.RouterServiceStub(channel).ForwardStream) as stream,
    ):
        with devices_held(mesh):
            stream.send(forward(MOE, rows(1), 1, takes_credit=True))
            stream.send(*(forward(MOE, rows(1), frame_id) for frame_id in range(2, 9)))
            credit = stream.receive()
            refused = [stream.receive() for _ in range(2)]
        answered = {stream.receive().frame_id for _ in range(6)}

    assert (credit.frame_id, credit.WhichOneof("kind")) == (0, "credit")
    assert (credit.credit.frames, credit.credit.bytes) == (3, 256 << 20)
    assert {message.frame_id for message in refused} == {7, 8}
    assert {message.error.reason for message in refused} == {"QUEUE_FULL"}
    assert answered == {1, 2, 3, 4, 5, 6}
    wait_until_idle(mesh)


def test_a_foreign_client_that_asks_for_no_credit_is_sent_answers_only(mesh) -> None:
    with (
        channel_to(mesh.address) as channel,
        RawStream(router_pb2_grpc.RouterServiceStub(channel).ForwardStream) as stream,
    ):
        stream.send(*(forward(MOE, rows(1), frame_id) for frame_id in (1, 2, 3)))
        messages = [stream.receive() for _ in range(3)]

    assert {message.WhichOneof("kind") for message in messages} == {"forward"}
    assert all(floats(message.forward.hidden_states).isfinite().all() for message in messages)
    wait_until_idle(mesh)
