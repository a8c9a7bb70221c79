"""Servers come and go with the load: real Ray, with its real autoscaler, and real gRPC."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import psutil
import pytest
import ray
import torch

from expertmesh import DeadlineError, UnavailableError
from expertmesh.config import AutoscaleConfig
from expertmesh.model import Slot
from expertmesh.v1 import control_pb2 as pb
from fleet import control, launch
from fleet.cluster import Cluster
from fleet.resources import Request
from fleet.roster import Roster
from tests.checkpoints import make_checkpoint
from tests.load import Load
from tests.ray_head import Head, autoscaled_head, nodes_alive

pytestmark = pytest.mark.ray
UP_S = 30.0  # from the first request of the load to an answer of the new node's server
DOWN_S = 60.0
_LOOK_S = 0.2
_CONFIG = AutoscaleConfig(
    min_replicas=1,
    max_replicas=2,
    target_ongoing_requests=0.5,
    look_back_period_s=3.0,
    downscale_delay_s=4.0,
)


@dataclass(frozen=True)
class Running:
    """A cluster of one server to begin with, on a Ray that can grow."""

    cluster: Cluster
    model: torch.nn.Module
    head: Head

    def fleet(self) -> pb.GetFleetResponse:
        """What the load controller knows."""
        return control.get_fleet(self.cluster.controller_address)

    def ready(self) -> list[str]:
        """Names of the servers that answer."""
        servers = self.fleet().servers
        return [s.server.server_id for s in servers if s.server.state == "ready"]

    def drains(self) -> bool:
        """Whether a server has been told to go, and has not gone."""
        return any(each.server.state == "draining" for each in self.fleet().servers)

    def answered(self, name: str) -> int:
        """Requests that a server has computed."""
        return sum(
            sum(each.load.queue_delays)
            for each in self.fleet().servers
            if each.server.server_id == name
        )

    def load(self, clients: int, rows: int) -> Load:
        """Requests whose answers are compared with the model's own."""
        return Load(self.cluster.address, self.model, clients, rows, timeout=30.0)

    def is_calm(self) -> bool:
        """One server, one node, nothing under way."""
        report = self.fleet().report
        return (
            report.replicas == 1
            and report.starting == 0
            and self.ready() == ["shard0-replica0"]
            and nodes_alive() == []
        )


def _wait_until(holds: Callable[[], object], timeout_s: float, what: str) -> None:
    """Polls, at leisure: the machine has the cluster's requests to answer, and its nodes to start.

    A look that the load controller has no time for is not one.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            if holds():
                return
        except (UnavailableError, DeadlineError):
            pass
        assert time.monotonic() < end, f"not {what} within {timeout_s} s"
        time.sleep(_LOOK_S)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    ray.shutdown()
    with (
        autoscaled_head(max_workers=2, idle_s=3.0) as head,
        launch(
            path,
            shards=1,
            ray_address=head.address,
            cpus_per_server=1,
            backend="reference",
            autoscale=_CONFIG,
        ) as cluster,
    ):
        yield Running(cluster, model, head)
    assert head.processes() == []


def test_load_brings_a_node_that_serves_and_its_end_takes_it_away_again(
    running: Running,
) -> None:
    _wait_until(running.is_calm, DOWN_S, "calm")
    with running.load(clients=1, rows=1) as trickle:
        trickle.wait_right(20, 30.0)
        began = time.monotonic()
        with running.load(clients=4, rows=16) as rush:
            _wait_until(nodes_alive, UP_S, "a node added")
            node_s = time.monotonic() - began
            _wait_until(lambda: running.answered("auto-1") > 0, UP_S, "served by the new node")
            serving_s = time.monotonic() - began
            rush.wait_right(50, 30.0)
        ended = time.monotonic()
        _wait_until(lambda: "auto-1" not in running.ready(), DOWN_S, "drained")
        drained_s = time.monotonic() - ended
        _wait_until(lambda: nodes_alive() == [], DOWN_S, "the node removed")
        gone_s = time.monotonic() - ended
        trickle.wait_right(20, 30.0)

    print(
        f"\nload up: node after {node_s:.1f} s, its server answers after {serving_s:.1f} s; "
        f"load down: drained after {drained_s:.1f} s, node gone after {gone_s:.1f} s; "
        f"{len(rush.outcome.right) + len(trickle.outcome.right)} right answers"
    )
    assert rush.outcome.errors == trickle.outcome.errors == []
    assert rush.outcome.wrong == trickle.outcome.wrong == []
    assert serving_s <= UP_S


def test_a_supervisor_killed_in_the_middle_of_a_step_is_followed_by_one_that_goes_on(
    running: Running,
) -> None:
    _wait_until(running.is_calm, DOWN_S, "calm")
    before = running.fleet().lease_owner
    victim = ray.get(running.cluster.supervisor.pid.remote())
    with running.load(clients=4, rows=16) as rush:
        _wait_until(lambda: len(running.cluster.servers) == 2, UP_S, "a server asked for")
        os.kill(victim, signal.SIGKILL)
        _wait_until(lambda: len(running.ready()) == 2, DOWN_S, "two servers ready")
        _wait_until(lambda: running.fleet().lease_owner not in ("", before), DOWN_S, "a new owner")
        rush.wait_right(20, 30.0)
        asked = len(running.cluster.servers)
    _wait_until(running.is_calm, DOWN_S, "one server again")

    assert asked == 2
    assert ray.get(running.cluster.supervisor.pid.remote()) != victim
    assert rush.outcome.errors == []
    assert rush.outcome.wrong == []


def test_a_supervisor_killed_while_a_server_drains_is_followed_by_one_that_ends_it(
    running: Running,
) -> None:
    _wait_until(running.is_calm, DOWN_S, "calm")
    before = running.fleet().lease_owner
    victim = ray.get(running.cluster.supervisor.pid.remote())
    with running.load(clients=1, rows=1) as trickle:
        with running.load(clients=4, rows=16) as rush:
            _wait_until(lambda: len(running.ready()) == 2, DOWN_S, "two servers ready")
        _wait_until(running.drains, DOWN_S, "a server drains")
        os.kill(victim, signal.SIGKILL)
        _wait_until(running.is_calm, DOWN_S, "one server again")
        trickle.wait_right(20, 30.0)
        owner = running.fleet().lease_owner

    assert owner not in ("", before)
    assert ray.get(running.cluster.supervisor.pid.remote()) != victim
    assert rush.outcome.errors == trickle.outcome.errors == []
    assert rush.outcome.wrong == trickle.outcome.wrong == []


def test_a_server_whose_launcher_has_gone_ends_by_itself(running: Running) -> None:
    roster = running.cluster.roster
    assert roster is not None
    orphans = Roster(
        namespace="nobody-supervises-this",
        request=Request(cpus=0.5, memory_bytes=1 << 28, gpus=0, threads=1),
        template=replace(roster.template, controller="127.0.0.1:1", orphan_s=2.0),
    )
    actor = orphans.start("orphan", [Slot(1, 0)])
    pid = ray.get(actor.pid.remote())
    there = orphans.names()

    _wait_until(lambda: orphans.names() == set(), DOWN_S, "ended")
    _wait_until(lambda: not psutil.pid_exists(pid), DOWN_S, "its process gone")
    assert there == {"orphan"}
