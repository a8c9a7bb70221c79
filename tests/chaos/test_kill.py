"""An expert actor is killed with SIGKILL under load: no answer is wrong, and none is late."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

import expertmesh
from expertmesh.v1 import router_pb2
from fleet import Cluster, launch
from tests.checkpoints import make_checkpoint
from tests.load import Load
from tests.mesh import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

IN_FLIGHT = 64
QUIET, AFTER = 1000, 2000  # answers before and after the kill
OVERTAKEN = 4 * IN_FLIGHT  # answers that may come before one's own, with a replica
PAUSE_SHARE = 1 / 12  # of a restart, which a slow machine slows, too: so long no answer at all
BACK_S = 30.0  # when answers must be right again, without one


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


def _status(cluster: Cluster) -> router_pb2.GetStatusResponse:
    with expertmesh.connect(cluster.address) as mesh:
        return mesh.status()


def _kill(cluster: Cluster) -> tuple[float, router_pb2.ServerStatus]:
    """SIGKILL for the process of the first server: when, and which."""
    victim = _status(cluster).servers[0]
    os.kill(victim.pid, signal.SIGKILL)
    return time.monotonic(), victim


@pytest.fixture
def two_replicas(checkpoint: tuple[Path, torch.nn.Module]) -> Iterator[Cluster]:
    with launch(checkpoint[0], shards=2, replicas=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one_replica(checkpoint: tuple[Path, torch.nn.Module]) -> Iterator[Cluster]:
    with launch(checkpoint[0], shards=2, replicas=1) as cluster:
        yield cluster


def test_with_two_replicas_every_request_is_answered_right_and_in_time(
    two_replicas: Cluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    before = _status(two_replicas)
    with Load(two_replicas.address, checkpoint[1], IN_FLIGHT, rows=4, timeout=20.0) as load:
        load.wait_right(QUIET, 120.0)
        killed_at, victim = _kill(two_replicas)
        wait_until(lambda: _is_back(two_replicas, victim), BACK_S, "the killed server back")
        back_s = time.monotonic() - killed_at
        load.wait_right(AFTER, 120.0)
    after = _status(two_replicas)

    outcome = load.outcome
    assert outcome.wrong == []
    assert outcome.errors == []
    assert after.retried_pairs > before.retried_pairs, "the fault hit requests in flight"
    assert outcome.most_overtaken(killed_at) <= OVERTAKEN
    assert outcome.longest_silence(killed_at) <= back_s * PAUSE_SHARE


def test_with_one_replica_answers_are_right_or_errors_and_soon_right_again(
    one_replica: Cluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    timeout = 1.0  # shorter than any restart, which imports torch: some requests must fail
    with Load(one_replica.address, checkpoint[1], IN_FLIGHT, rows=4, timeout=timeout) as load:
        load.wait_right(QUIET, 120.0)
        killed_at, victim = _kill(one_replica)
        load.wait_right(AFTER, 120.0)

    outcome = load.outcome
    assert outcome.wrong == []
    hit = [ended for ended, _, _ in outcome.errors if ended >= killed_at]
    assert hit, "requests with so short a deadline cannot outlast the restart"
    assert all(took <= timeout + 1.0 for _, took, _ in outcome.errors)
    assert max(hit) <= killed_at + BACK_S
    assert _is_back(one_replica, victim)


def test_a_request_that_may_wait_outlasts_the_restart_of_the_only_server(
    one_replica: Cluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    with Load(one_replica.address, checkpoint[1], IN_FLIGHT, rows=4, timeout=60.0) as load:
        load.wait_right(QUIET // 4, 120.0)
        _kill(one_replica)
        load.wait_right(AFTER // 4, 120.0)

    assert load.outcome.wrong == []
    assert load.outcome.errors == []


def test_a_killed_router_and_controller_come_back_where_they_were(
    one_replica: Cluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    pids = [ray.get(a.pid.remote()) for a in (*one_replica.routers, one_replica.controller)]
    with expertmesh.connect(one_replica.address) as mesh:
        hidden = torch.randn(5, mesh.describe().hidden_size)
        expected = mesh.forward(hidden, 1)
        before = mesh.load().counts[1].sum()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        output = mesh.forward(hidden, 1, timeout=60.0)
        wait_until(lambda: _reports(mesh), BACK_S, "the controller back")
        after = mesh.load().counts[1].sum()

    torch.testing.assert_close(output, expected)
    assert after >= before


def _reports(mesh: expertmesh.Mesh) -> bool:
    try:
        mesh.load(timeout=2.0)
    except expertmesh.MeshError:
        return False
    return True


def _is_back(cluster: Cluster, victim: router_pb2.ServerStatus) -> bool:
    return any(
        server.server_id == victim.server_id
        and server.incarnation != victim.incarnation
        and server.connected
        for server in _status(cluster).servers
    )
