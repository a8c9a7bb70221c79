"""A real router beside servers that fall silent: in the middle of an answer, or for good."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import expertmesh
from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard
from expertmesh.config import RouterConfig
from expertmesh.rpc import loop
from expertmesh.rpc.served_frames import ServedFrames
from expertmesh.v1 import router_pb2
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.ties import rows_apart

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MANY = 9000  # rows of 256 bytes: an answer of three chunks
TIMEOUT_S = 60.0  # far above the patience, also of a busy machine: without a replica it would end


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


def _truth(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
    return output


def _seen(mesh: LocalMesh, name: str) -> router_pb2.ServerStatus:
    (found,) = (s for s in mesh.routers[0].router.pool.statuses() if s.server_id == name)
    return found


@dataclass
class Halved:
    """A server whose answers end after their first chunk, where they have more."""

    admission: object
    hangs: bool = True
    begun: int = 0


@pytest.fixture
def two_servers(checkpoint: tuple[Path, torch.nn.Module]) -> Iterator[LocalMesh]:
    config = RouterConfig(hedge_burst=0.0, hedge_share=0.0)
    with local_mesh(checkpoint[0], shards=1, replicas=2, router_config=config) as mesh:
        yield mesh


def _halve(monkeypatch: pytest.MonkeyPatch, mesh: LocalMesh) -> Halved:
    """From now on the first server's answers end so."""
    halved, end = Halved(mesh.servers[0]._server._admission), ServedFrames._end

    def half(served: Any, frame_id: int, frame: Any, messages: Any, *rest: Any) -> None:
        if halved.hangs and served._protocol.admission is halved.admission:
            messages = list(messages)
            halved.begun += len(messages) > 1
            messages = islice(messages, 1)
        end(served, frame_id, frame, messages, *rest)

    monkeypatch.setattr(ServedFrames, "_end", half)
    return halved


def test_a_server_that_hangs_between_two_chunks_is_answered_for_by_its_replica(
    two_servers: LocalMesh,
    checkpoint: tuple[Path, torch.nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = rows_apart(checkpoint[0], 1, MANY, 0)
    expected = _truth(checkpoint[1], hidden)
    with expertmesh.connect(two_servers.address) as client:
        output = client.forward(hidden, 1, timeout=TIMEOUT_S)
        torch.testing.assert_close(output, expected, **CLOSE)
        halved = _halve(monkeypatch, two_servers)
        output = client.forward(hidden, 1, timeout=TIMEOUT_S)
        suspected = _seen(two_servers, "s0r0").suspected
        halved.hangs = False

        def back() -> bool:
            client.forward(hidden, 1, timeout=TIMEOUT_S)
            return not _seen(two_servers, "s0r0").suspected

        wait_until(back, 60.0, "trusted again")

    torch.testing.assert_close(output, expected, **CLOSE)
    assert halved.begun > 0, "the fault hit"
    assert suspected


@dataclass
class Device:
    """A server's device, which waits until it may go on."""

    shard: ExpertShard
    taken: threading.Event = field(default_factory=threading.Event)
    may_go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Device]]:
    """Devices that wait, by the id of their shard."""
    devices: dict[int, Device] = {}
    compute = ExpertShard.compute

    def waiting(shard: ExpertShard, *arguments: Any) -> torch.Tensor:
        device = devices.get(id(shard))
        if device is not None:
            device.taken.set()
            device.may_go_on.wait(60.0)
        return compute(shard, *arguments)

    monkeypatch.setattr(ExpertShard, "compute", waiting)
    monkeypatch.setattr(DeviceRunner, "execute_now", lambda self, request: None)
    yield devices
    for device in devices.values():
        device.may_go_on.set()


def test_what_a_server_was_asked_for_goes_to_its_replica_once_the_controller_has_lost_it(
    checkpoint: tuple[Path, torch.nn.Module], held: dict[int, Device]
) -> None:
    patient = RouterConfig(hedge_after_s=1000.0)
    hidden = rows_apart(checkpoint[0], 1, 8, 0)
    expected = _truth(checkpoint[1], hidden)
    with (
        local_mesh(checkpoint[0], shards=1, replicas=2, router_config=patient) as mesh,
        expertmesh.connect(mesh.address) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        shard = mesh.servers[0].shard
        device = held[id(shard)] = Device(shard)
        answers = [threads.submit(client.forward, hidden, 1, timeout=TIMEOUT_S) for _ in range(8)]
        assert device.taken.wait(20.0), "it was asked"

        async def lose() -> None:
            pool = mesh.routers[0].router.pool
            directory = [router_pb2.ServerStatus.FromString(s.SerializeToString())
                         for s in pool.statuses()]  # fmt: skip
            for server in directory:
                if server.server_id == "s0r0":
                    server.state = "lost"
            pool.update(directory)

        loop.run(lose())
        outputs = [answer.result() for answer in answers]
        device.may_go_on.set()

    for output in outputs:
        torch.testing.assert_close(output, expected, **CLOSE)
