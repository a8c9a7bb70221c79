"""Clusters on Ray: several nodes, GPUs, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import expertmesh
from expert_service.actor import ExpertServerActor, ExpertServerOptions
from expertmesh import ConfigError
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import AutoscaleConfig, RebalanceConfig
from expertmesh.placement import initial_parts
from fleet import control, launch
from tests.checkpoints import make_checkpoint
from tests.mesh import wait_until

pytestmark = pytest.mark.ray
_COMMAND_S = 180.0
_SETTLE_S = 30.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[RayCluster]:
    """Three raylets on this machine; the second and third pretend to have a GPU each."""
    memory = {"memory": 4 << 30, "object_store_memory": 100 << 20}
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, **memory})
    cluster.add_node(num_cpus=2, num_gpus=1, **memory)
    cluster.add_node(num_cpus=2, num_gpus=1, **memory)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_shards_spread_over_the_nodes_of_a_running_cluster(
    three_nodes: RayCluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    path, model = checkpoint
    with (
        launch(path, shards=3, ray_address=three_nodes.address) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        nodes = {server.node for server in mesh.status().servers}
        hidden = torch.randn(9, mesh.describe().hidden_size)
        outputs = [mesh.forward(hidden, layer) for layer in range(3)]

    assert len(nodes) == 3
    for layer, output in enumerate(outputs):
        with torch.no_grad():
            expected = model.model.layers[layer].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_a_node_cannot_see_is_an_error_that_names_the_node(
    three_nodes: RayCluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    path, _ = checkpoint
    if not ray.is_initialized():
        ray.init(address=three_nodes.address)
    options = ExpertServerOptions(
        checkpoint=str(path / "not-mounted"),
        slots=(),
        server_id="lonely",
        controller="127.0.0.1:1",
    )
    actor = ExpertServerActor.remote(options)

    with pytest.raises(expertmesh.CheckpointError) as caught:
        ray.get(actor.endpoint.remote())
    node = ray.get(actor.node.remote())
    ray.kill(actor)

    assert caught.value.cause.message.startswith(f"node {node}: ")  # type: ignore[attr-defined]
    assert "not-mounted" in str(caught.value)


def test_each_server_on_cuda_gets_a_gpu_of_its_own(
    three_nodes: RayCluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    path, _ = checkpoint
    if not ray.is_initialized():
        ray.init(address=three_nodes.address)
    from fleet.launch import _nodes, start_servers
    from fleet.resources import plan_request

    with Checkpoint.open(path) as opened:
        spec = opened.spec
    parts = initial_parts(spec, 2)
    request = plan_request(_nodes(), parts, 1, spec, torch.float32, "cuda")
    template = ExpertServerOptions(
        checkpoint=str(path), slots=(), server_id="", controller="127.0.0.1:1", device="cuda"
    )
    actors = start_servers(parts, 1, request, template)

    homes = [ray.get([a.node.remote(), a.visible_devices.remote()]) for a in actors.values()]
    for actor in actors.values():
        ray.kill(actor)

    assert request.gpus == 1.0
    assert len({tuple(home) for home in homes}) == 2
    assert all(devices.isdigit() for _, devices in homes)


def test_cuda_without_a_gpu_in_the_cluster_is_refused_at_once(
    three_nodes: RayCluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    from fleet.resources import Node, plan_request

    with Checkpoint.open(checkpoint[0]) as opened:
        spec = opened.spec
    nodes = [Node("a", cpus=4, memory_bytes=8 << 30, gpus=0)]

    with pytest.raises(ConfigError, match="no node of this Ray cluster has a GPU"):
        plan_request(nodes, initial_parts(spec, 2), 1, spec, torch.float32, "cuda")


def test_a_server_that_is_drained_ends_and_leaves_the_others_serving(
    three_nodes: RayCluster, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    path, model = checkpoint
    with (
        launch(path, shards=1, replicas=2, ray_address=three_nodes.address) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        before = sorted(cluster.endpoints())
        control.begin_drain(cluster.controller_address, "shard0-replica1", ()).result()
        _wait_until(lambda: sorted(cluster.endpoints()) == ["shard0-replica0"])
        hidden = torch.randn(9, mesh.describe().hidden_size)
        output = mesh.forward(hidden, 1)

    with torch.no_grad():
        expected = model.model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert before == ["shard0-replica0", "shard0-replica1"]


def test_two_clusters_of_one_process_share_its_ray_and_no_settings(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, _ = checkpoint
    ray.shutdown()
    with launch(path, shards=2) as first:
        with (
            launch(path, shards=1, wire_dtype="bfloat16", data_connections="off") as second,
            expertmesh.connect(second.address) as mesh,
        ):
            hidden = torch.randn(3, mesh.describe().hidden_size)
            of_second = mesh.forward(hidden, 1)
            assert _ways(mesh) == {"grpc"}
        with expertmesh.connect(first.address) as mesh:
            of_first = mesh.forward(hidden, 1)
            wait_until(lambda: _ways(mesh) == {"tcp"}, 10.0, "on data connections")

    assert 1e-4 < (of_second - of_first).norm() / of_first.norm() <= 6e-3  # bfloat16 on the way
    assert not ray.is_initialized()


def _ways(mesh: expertmesh.client.Mesh) -> set[str]:
    """How frames travel from client to router and on to the servers."""
    (link,) = mesh._mesh._links.values()
    assert link._stream is not None
    return {link._stream.transport, *(server.transport for server in mesh.status().servers)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ray_address": "127.0.0.1:1"}, "cannot join Ray at '127.0.0.1:1'"),
        ({"shards": 0}, "shards is 0"),
        ({"shards": 2.5}, "shards is 2.5"),
        ({"replicas": "2"}, "replicas is '2'"),
        ({"port": 70000}, "port is 70000"),
        ({"port": -1}, "port is -1"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"backend": "abacus"}, "backend is 'abacus'"),
        ({"weights": "fp4"}, "weights is 'fp4'"),
        ({"balance": "upwards"}, "upwards"),
        ({"wire_dtype": "int4"}, "router.wire_dtype is 'int4'"),
        ({"data_connections": "on"}, "data_connections is 'on'"),
        ({"shards": 1000}, "use fewer shards"),
        ({"autoscale": AutoscaleConfig()}, "autoscale needs ray_address"),
        ({"server_rates": "guessed"}, "server_rates is 'guessed'"),
        (
            {"autoscale": AutoscaleConfig(), "rebalance": RebalanceConfig(redundant=2)},
            "rebalance.redundant is 2, but with autoscale",
        ),
        (
            {
                "autoscale": AutoscaleConfig(max_replicas=3),
                "shards": 2,
                "replicas": 2,
                "ray_address": "127.0.0.1:1",
                "cpus_per_server": 1,
            },
            "4 servers to begin with",
        ),
    ],
)
def test_a_launch_that_cannot_be_is_refused_before_ray_starts(
    checkpoint: tuple[Path, torch.nn.Module], arguments: dict[str, Any], said: str
) -> None:
    ray.shutdown()

    with pytest.raises(ConfigError, match=said):
        launch(checkpoint[0], **arguments)

    assert not ray.is_initialized()


def _expertmesh(*arguments: str, state: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fleet.cli", *arguments]
    environment = {**os.environ, "XDG_STATE_HOME": str(state)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def _run(*arguments: str, state: Path) -> tuple[int, dict[str, object]]:
    process = _expertmesh(*arguments, state=state)
    out, _ = process.communicate(timeout=_COMMAND_S)
    return process.returncode, json.loads(out)


def test_serve_status_and_down_work_together(
    checkpoint: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    path, model = checkpoint
    with _expertmesh(
        "serve", str(path), "--shards", "2", "--port", "0", "--json", state=tmp_path
    ) as serve:
        assert serve.stdout is not None
        line = serve.stdout.readline()
        assert line, serve.communicate()[1]
        ready = json.loads(line)
        with expertmesh.connect(ready["address"]) as mesh:
            hidden = torch.randn(3, mesh.describe().hidden_size)
            output = mesh.forward(hidden, 1)
        status_code, status = _run("status", "--json", state=tmp_path)
        down_code, down = _run("down", "--json", state=tmp_path)
        serve.communicate(timeout=_COMMAND_S)
        again_code, _ = _run("status", "--json", state=tmp_path)

    with torch.no_grad():
        expected = model.model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr,index]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert ready["event"] == "READY"
    assert sorted(ready["experts"]) == ["shard0-replica0", "shard1-replica0"]
    assert (status_code, status["ready"], len(status["servers"])) == (0, True, 2)  # type: ignore[arg-type]
    assert (down_code, down["event"]) == (0, "DOWN")
    assert serve.returncode == 0
    assert again_code == 1


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP as a terminal's programs have it, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
def test_a_terminal_that_is_closed_ends_the_cluster_and_its_note(
    checkpoint: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    with _expertmesh(
        "serve", str(checkpoint[0]), "--shards", "1", "--port", "0", "--json", state=tmp_path
    ) as serve:
        assert serve.stdout is not None
        line = serve.stdout.readline()
        assert line, serve.communicate()[1]
        noted = (tmp_path / "expertmesh" / "last-cluster.json").exists()
        serve.send_signal(signal.SIGHUP)
        serve.communicate(timeout=_COMMAND_S)

    assert noted
    assert serve.returncode == 0
    assert list((tmp_path / "expertmesh").iterdir()) == []


def test_serve_refuses_a_checkpoint_that_it_cannot_serve(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}')

    code, said = _run("serve", str(tmp_path), "--json", state=tmp_path)

    assert code == 1
    assert "perceptron" in said["error"]["message"]  # type: ignore[index]


@ray.remote(num_cpus=0)
class _Holder:
    """Holds what its options ask for."""

    def ready(self) -> bool:
        return True


def test_an_interrupted_start_leaves_nothing_behind(
    three_nodes: RayCluster, checkpoint: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    ray.init(address=three_nodes.address, ignore_reinit_error=True)
    # Expert servers find no memory, so the start is certainly under way when the signal comes.
    holders = [
        _Holder.options(  # type: ignore[attr-defined]
            memory=node["Resources"]["memory"] - 1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.get([holder.ready.remote() for holder in holders])
    cpus = ray.cluster_resources()["CPU"]
    _wait_until(lambda: ray.available_resources().get("CPU") == cpus)

    with _expertmesh(
        "serve", str(checkpoint[0]), "--port", "0", "--ray-address", three_nodes.address,
        state=tmp_path,
    ) as serve:  # fmt: skip
        assert serve.stderr is not None
        first_line = serve.stderr.readline()
        _wait_until(lambda: ray.available_resources().get("CPU") != cpus)
        serve.send_signal(signal.SIGINT)
        serve.communicate(timeout=_COMMAND_S)

    assert first_line == "the router is up; expert servers start\n"
    assert serve.returncode == 130
    assert not (tmp_path / "expertmesh" / "last-cluster.json").exists()
    _wait_until(lambda: ray.available_resources().get("CPU") == cpus)
    for holder in holders:
        ray.kill(holder)


def _wait_until(holds: Callable[[], bool]) -> None:
    """Ray tells what is free a moment after it has changed."""
    end = time.monotonic() + _SETTLE_S
    while not holds():
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.05)
