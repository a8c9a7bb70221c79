"""Expert servers on Ray for a load controller and a router that run elsewhere; metrics on Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster

import expertmesh
from expertmesh import ConfigError
from expertmesh.v1 import router_pb2
from fleet import launch
from tests.checkpoints import make_checkpoint
from tests.mesh import wait_until
from tests.processes import Service
from tests.scrape import scrape

pytestmark = pytest.mark.ray
_COMMAND_S = 180.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


@pytest.fixture(scope="module")
def nodes_with_a_slot() -> Iterator[RayCluster]:
    """A head that offers nothing, as KubeRay's, and two nodes with room for one server each."""
    memory = {"memory": 4 << 30, "object_store_memory": 100 << 20}
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        cluster.add_node(num_cpus=2, resources={"expert_slot": 1}, **memory)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_controller_that_does_not_answer_is_an_error_before_ray_is_joined(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    ray.shutdown()

    with pytest.raises(ConfigError, match=r"no load controller answers at '127\.0\.0\.1:1'"):
        launch(checkpoint[0], controller="127.0.0.1:1")

    assert not ray.is_initialized()


def test_serve_adds_expert_servers_to_a_controller_that_runs_elsewhere(
    nodes_with_a_slot: RayCluster, checkpoint: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    path, model = checkpoint
    with ExitStack() as stack:
        controller = stack.enter_context(
            Service("load_controller", "--state", str(tmp_path / "state.sqlite"))
        )
        router = stack.enter_context(
            Service("router_service", str(path), "--controller", controller.address)
        )
        command = [
            sys.executable, "-m", "fleet.cli", "serve", str(path), "--json",
            "--ray-address", nodes_with_a_slot.address, "--controller", controller.address,
            "--cpus-per-server", "1", "--metrics-port", "0",
        ]  # fmt: skip
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
        serve = stack.enter_context(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
        )
        assert serve.stdout is not None
        line = serve.stdout.readline()
        assert line, serve.communicate()[1]
        ready = json.loads(line)
        with expertmesh.connect(router.address) as mesh:
            wait_until(lambda: mesh.status().ready, 20.0, "ready")
            nodes = {server.node for server in mesh.status().servers}
            hidden = torch.randn(3, mesh.describe().hidden_size)
            output = mesh.forward(hidden, 1)
            serve.send_signal(signal.SIGTERM)
            serve.communicate(timeout=_COMMAND_S)
            states = {server.state for server in mesh.status().servers}

    with torch.no_grad():
        expected = model.model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert sorted(ready["experts"]) == ["shard0-replica0", "shard1-replica0"]
    assert ready["address"] == ""
    assert len(nodes) == 2, "a slot is for one server"
    assert serve.returncode == 0
    assert states == {"draining"}


def test_a_server_without_a_slot_waits_until_a_node_with_one_comes(
    nodes_with_a_slot: RayCluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    came: list[object] = []

    def bring_a_node(status: router_pb2.GetStatusResponse) -> None:
        """What the autoscaler does: all that can start has, and something waits."""
        if not came and [server.state for server in status.servers] == ["ready", "ready"]:
            came.append(nodes_with_a_slot.add_node(num_cpus=1, resources={"expert_slot": 1}))

    with launch(
        checkpoint[0],
        shards=3,
        ray_address=nodes_with_a_slot.address,
        cpus_per_server=1,
        progress=bring_a_node,
    ) as cluster:
        nodes = {server.node for server in cluster.status().servers}

    assert len(came) == 1
    assert len(nodes) == 3


def test_every_process_of_a_launched_cluster_serves_metrics_on_a_port_of_its_own(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    first = _free_ports(4)
    with launch(checkpoint[0], shards=2, metrics_port=first):
        seen = [scrape(f"127.0.0.1:{first + index}") for index in range(4)]

    assert seen[0].value("expertmesh_controller_servers", state="ready") == 2
    assert seen[1].value("expertmesh_router_ready") == 1
    for index, server in enumerate(seen[2:]):
        name = f"shard{index}-replica0"
        assert server.value("expertmesh_expert_info", server=name, backend="onednn/cpu") == 1


def _free_ports(count: int) -> int:
    """The first of so many consecutive ports that nobody listens on."""
    while True:
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            sockets[0].bind(("127.0.0.1", 0))
            first: int = sockets[0].getsockname()[1]
            try:
                for offset, other in enumerate(sockets[1:], 1):
                    other.bind(("127.0.0.1", first + offset))
            except (OSError, OverflowError):
                continue
        return first
