"""Servers are added, drained and counted: real gRPC, in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import expertmesh
from expert_service.server import ExpertServer
from expertmesh import InvalidRequestError, LeaseLostError, NoRoomError
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import AutoscaleConfig
from expertmesh.model import Slot
from expertmesh.placement import initial_parts
from expertmesh.rpc import loop
from expertmesh.v1 import control_pb2 as pb
from fleet import control
from fleet.cli import main
from fleet.moves_away import moves_away
from fleet.scaling import ServerPlan
from fleet.supervisor import Supervisor
from tests import processes
from tests.checkpoints import make_checkpoint
from tests.load import Load
from tests.mesh import LocalMesh, local_mesh, start_server_holding, wait_until

_SETTLE_S = 20.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


@pytest.fixture
def mesh(checkpoint: tuple[Path, torch.nn.Module]) -> Iterator[LocalMesh]:
    with local_mesh(checkpoint[0], shards=2, routers=1) as cluster:
        yield cluster


class LocalServers:
    """What Ray is to a supervisor, in this process: a server that has drained ends."""

    def __init__(self, cluster: LocalMesh) -> None:
        self._cluster = cluster
        self._running = dict(zip(("s0r0", "s1r0"), cluster.servers, strict=True))
        self.asked: list[str] = []
        self.ended: list[str] = []

    def names(self) -> set[str]:
        """Every server that there is."""
        for name, server in list(self._running.items()):
            if server.drained.done():
                loop.run(server.stop())
                del self._running[name]
        return set(self._running)

    def start(self, name: str, slots: Sequence[Slot]) -> None:
        """Starts a server."""
        self.asked.append(name)
        server = loop.run(
            start_server_holding(self._cluster.path, self._cluster.controller.address, name, slots)
        )
        self._cluster.extra.append(server)
        self._running[name] = server

    def end(self, name: str, graceful: bool) -> None:
        """Ends a server."""
        self.ended.append(name)
        loop.run(self._running.pop(name).stop())


def _supervisor(
    cluster: LocalMesh, servers: LocalServers, owner: str = "a", **config: object
) -> Supervisor:
    with Checkpoint.open(cluster.path) as opened:
        plan = ServerPlan(opened.spec, 2)
    settings = {"downscale_delay_s": 0.0, "look_back_period_s": 0.5, **config}
    return Supervisor(
        cluster.controller.address,
        plan,
        AutoscaleConfig(**settings),
        servers,
        owner=owner,  # type: ignore[arg-type]
    )


def _ready(cluster: LocalMesh) -> list[str]:
    servers = control.get_fleet(cluster.controller.address).servers
    return [s.server.server_id for s in servers if s.server.state == "ready"]


def _turn_until(supervisor: Supervisor, cluster: LocalMesh, servers: int) -> None:
    def there() -> bool:
        supervisor.turn()
        return len(_ready(cluster)) == servers

    wait_until(there, _SETTLE_S, f"{servers} servers")


def _held(cluster: LocalMesh) -> list[set[Slot]]:
    servers = control.get_fleet(cluster.controller.address).servers
    return [
        {Slot(layer.layer, expert) for layer in s.layers for expert in layer.experts}
        for s in servers
        if s.server.state == "ready"
    ]


def test_servers_come_and_go_by_hand_without_a_failed_or_wrong_answer(
    mesh: LocalMesh,
    checkpoint: tuple[Path, torch.nn.Module],
    capfd: pytest.CaptureFixture[str],
) -> None:
    servers = LocalServers(mesh)
    supervisor = _supervisor(mesh, servers, min_replicas=2, max_replicas=2)
    supervisor.turn()
    with Load(mesh.address, checkpoint[1], clients=4, rows=4, timeout=20.0) as load:
        load.wait_right(50, 60.0)
        assert main(["scale", "4", "--router", mesh.address, "--json"]) == 0
        asked = json.loads(capfd.readouterr().out)
        _turn_until(supervisor, mesh, 4)
        load.wait_right(50, 60.0)
        assert main(["scale", "--reset", "--router", mesh.address]) == 0
        _turn_until(supervisor, mesh, 2)
        load.wait_right(50, 60.0)
        held = _held(mesh)

    assert load.outcome.errors == []
    assert load.outcome.wrong == []
    assert asked["asked_for"] == [4, 4]
    assert servers.asked == ["auto-1", "auto-2"]
    assert servers.ended == []
    assert set().union(*held) == {slot for each in mesh.servers for slot in each._initial}


def test_a_supervisor_that_is_followed_by_another_acts_no_more(mesh: LocalMesh) -> None:
    servers = LocalServers(mesh)
    first = _supervisor(mesh, servers, "first", min_replicas=2, max_replicas=3)
    first.turn()

    with pytest.raises(LeaseLostError, match="first adds and removes servers here"):
        _supervisor(mesh, servers, "second").turn()
    control.take_lease(mesh.controller.address, "first", 0.0, pb.ScalingReport())
    second = _supervisor(mesh, servers, "second", min_replicas=2, max_replicas=3)
    second.turn()

    with pytest.raises(LeaseLostError, match="second adds and removes servers here"):
        first.turn()
    with pytest.raises(LeaseLostError, match="another owner has taken the lease"):
        control.begin_drain(mesh.controller.address, "s0r0", (), fence=1).result()
    assert sorted(_ready(mesh)) == ["s0r0", "s1r0"]


def test_a_new_supervisor_goes_on_where_the_last_one_was_killed(mesh: LocalMesh) -> None:
    servers = LocalServers(mesh)
    _supervisor(mesh, servers, "first", min_replicas=3, max_replicas=3).turn()
    control.take_lease(mesh.controller.address, "first", 0.0, pb.ScalingReport())

    second = _supervisor(mesh, servers, "second", min_replicas=3, max_replicas=3)
    _turn_until(second, mesh, 3)
    second.turn()

    assert servers.asked == ["auto-1"]


def test_quiet_hours_drop_every_redundant_copy(
    mesh: LocalMesh, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    servers = LocalServers(mesh)
    supervisor = _supervisor(mesh, servers, min_replicas=3, max_replicas=3)
    _turn_until(supervisor, mesh, 3)
    routed = {slot for slot in set().union(*_held(mesh)) if slot.layer and slot.expert < 16}
    assert sum(len(held & routed) for held in _held(mesh)) > len(routed)

    def is_quiet() -> bool:
        supervisor.turn()
        return sum(len(held & routed) for held in _held(mesh)) == len(routed)

    wait_until(is_quiet, _SETTLE_S, "without redundant copies")
    with expertmesh.connect(mesh.address) as client:
        hidden = torch.randn(8, client.describe().hidden_size)
        answered = client.forward(hidden, 1)

    with torch.no_grad():
        expected = checkpoint[1].model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(answered, expected, rtol=1e-4, atol=1e-5)


def test_draining_moves_last_copies_first_and_serving_goes_on(
    mesh: LocalMesh,
    checkpoint: tuple[Path, torch.nn.Module],
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Load(mesh.address, checkpoint[1], clients=4, rows=4, timeout=20.0) as load:
        load.wait_right(50, 60.0)
        assert main(["drain", "s0r0", "--router", mesh.address, "--dry-run", "--json"]) == 0
        shown = json.loads(capfd.readouterr().out)
        assert main(["drain", "s0r0", "--router", mesh.address, "--json"]) == 0
        done = json.loads(capfd.readouterr().out)
        loop.run(_stopped(mesh.servers[0]))
        load.wait_right(100, 60.0)

    assert load.outcome.errors == []
    assert load.outcome.wrong == []
    assert (shown["drained"], done["drained"]) == (False, True)
    assert {move["server"] for move in done["moves"]} == {"s1r0"}
    assert _ready(mesh) == ["s1r0"]
    assert main(["drain", "s0r0", "--router", mesh.address]) == 0


async def _stopped(server: ExpertServer) -> None:
    """What whoever runs a server does once it has been told to drain."""
    await server.drained
    await server.stop()


def test_the_last_server_is_not_drained(mesh: LocalMesh, capfd: pytest.CaptureFixture[str]) -> None:
    address = mesh.controller.address

    with pytest.raises(InvalidRequestError, match="holds the last copy of"):
        control.begin_drain(address, "s0r0", ()).result()
    assert main(["drain", "nobody", "--router", mesh.address]) == 1
    assert "name one of s0r0, s1r0" in capfd.readouterr().err
    assert sorted(_ready(mesh)) == ["s0r0", "s1r0"]


def test_a_server_stays_where_nobody_has_room_for_its_experts(
    mesh: LocalMesh, capfd: pytest.CaptureFixture[str]
) -> None:
    address, servers = mesh.controller.address, LocalServers(mesh)
    _supervisor(mesh, servers, min_replicas=2, max_replicas=2).turn()  # says what a server takes

    code = main(["drain", "s1r0", "--router", mesh.address, "--json"])
    said = json.loads(capfd.readouterr().out)["error"]

    assert (code, said["type"]) == (1, NoRoomError.__name__)
    assert "no other server has room for it" in said["message"]
    assert sorted(_ready(mesh)) == ["s0r0", "s1r0"]
    assert control.get_fleet(address).report.slots == 8


def test_scaling_by_hand_is_refused_where_nobody_would_do_it(
    mesh: LocalMesh, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["scale", "3", "--router", mesh.address])

    assert code == 1
    assert "start it with --autoscale" in capfd.readouterr().err
    assert main(["scale", "--router", mesh.address]) == 0
    assert "started without --autoscale" in capfd.readouterr().out


def test_fewer_servers_than_hold_the_model_cannot_be_asked_for(
    mesh: LocalMesh, capfd: pytest.CaptureFixture[str]
) -> None:
    _supervisor(mesh, LocalServers(mesh), min_replicas=2, max_replicas=3).turn()

    refused = main(["scale", "1", "--router", mesh.address])
    said = capfd.readouterr().err
    dry = main(["scale", "--min", "2", "--max", "9", "--router", mesh.address, "--dry-run"])

    assert (refused, dry) == (1, 0)
    assert "at least 2" in said
    assert control.get_fleet(mesh.controller.address).bounds == pb.ServerBounds()


def test_moves_of_a_running_cluster_cover_what_the_server_alone_holds(mesh: LocalMesh) -> None:
    fleet = control.get_fleet(mesh.controller.address)
    holds = dict(zip((s.server.server_id for s in fleet.servers), _held(mesh), strict=True))
    with Checkpoint.open(mesh.path) as opened:
        parts, room = initial_parts(opened.spec, 2), ServerPlan(opened.spec, 1).room

    moves = moves_away("s0r0", holds, {}, room)

    assert {Slot(m.layer, m.expert) for m in moves} == set(parts[0]) - set(parts[1])


def test_a_service_that_is_drained_ends_with_0(
    checkpoint: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    with processes.cluster(checkpoint[0], tmp_path, shards=1, replicas=2) as cluster:
        control.begin_drain(cluster.controller.address, "s0r1", ()).result()
        code = cluster.servers["s0r1"].process.wait(_SETTLE_S)
        with expertmesh.connect(cluster.router.address) as client:
            hidden = torch.randn(8, client.describe().hidden_size)
            answered = client.forward(hidden, 1)

    with torch.no_grad():
        expected = checkpoint[1].model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(answered, expected, rtol=1e-4, atol=1e-5)
    assert code == 0
