"""A Ray head of its own on this machine, with Ray's real autoscaler (v2). For tests.

`FakeMultiNodeProvider` stands for a cloud: the autoscaler starts and stops raylets on this machine
through it. Nothing here touches another Ray: own port, own temporary folder, own session, and
everything is ended by the process ids that carry this head's mark.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)

from tests.mesh import wait_until

_MARK = "EXPERTMESH_RAY_HEAD"
_START_S = 60.0
_END_S = 15.0
NODE_TYPE = "worker"
_HEAD_TYPE = "ray.head.default"


class NodesWithMemory(FakeMultiNodeProvider):  # type: ignore[misc]
    """Nodes whose type names its memory; the raylet says itself how much there is."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Mapping[str, float], labels: Any
    ) -> None:
        """As the base class does, which takes memory for a custom resource."""
        left = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, left, labels)


@dataclass(frozen=True)
class Head:
    """A running head."""

    address: str  # "host:port" of its GCS
    mark: str
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """Every process that this head, or one of its nodes, has started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.pid != os.getpid():
                    found.append(process)
            except psutil.Error:
                continue
        return found


def nodes_alive() -> list[str]:
    """Ids of the nodes that are there, the head's left out. This process is connected to Ray."""
    ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    return sorted(name for name in ids if name != FAKE_HEAD_NODE_ID)


@contextmanager
def autoscaled_head(max_workers: int, idle_s: float) -> Iterator[Head]:
    """A head with room for one expert server, and a node type with room for one each."""
    port = _free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    with tempfile.TemporaryDirectory(prefix="em-ray-") as name:
        folder = Path(name)
        head = Head(address, uuid.uuid4().hex, folder)
        config = folder / "autoscaling.json"  # JSON is YAML
        config.write_text(json.dumps(_config(address, max_workers, idle_s)))
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}",
            f"--temp-dir={folder / 'ray'}", f"--autoscaling-config={config}", "--num-cpus=2",
            '--resources={"expert_slot": 1}', "--include-dashboard=false",
            "--object-store-memory=100000000", "--disable-usage-stats", "--block",
            "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip
        log = (folder / "head.log").open("wb")
        with log:
            process = subprocess.Popen(
                command,
                env=_environment(head.mark),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            _wait_listening(process, port, folder)
            yield head
        finally:
            _end(head, process)


def _environment(mark: str) -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {
        **os.environ,
        _MARK: mark,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        # Both, as `ray up` and KubeRay set them: an autoscaler that first looks once the head is
        # registered takes the head's type from here, and without one never gets past that look.
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }


def _config(address: str, max_workers: int, idle_s: float) -> dict[str, Any]:
    return {
        "cluster_name": "test",
        "max_workers": max_workers,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "tests.ray_head.NodesWithMemory",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "available_node_types": {
            _HEAD_TYPE: {
                "resources": {"CPU": 2, "expert_slot": 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 0,
            },
            NODE_TYPE: {
                "resources": {
                    "CPU": 1,
                    "expert_slot": 1,
                    "memory": 4 << 30,
                    "object_store_memory": 100_000_000,
                },
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_workers,
            },
        },
        "head_node_type": _HEAD_TYPE,
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])


def _wait_listening(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    def listens() -> bool:
        if process.poll() is not None:
            raise AssertionError((folder / "head.log").read_text())
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens, _START_S, f"listening: {folder / 'head.log'} says why")


def _end(head: Head, process: subprocess.Popen[bytes]) -> None:
    """Ends the head, then every process of it that is still there."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_END_S)
    left = head.processes()
    for each in left:
        try:
            each.terminate()
        except psutil.Error:
            continue
    _, alive = psutil.wait_procs(left, timeout=_END_S)
    for each in [*alive, *head.processes()]:
        try:
            each.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(alive, timeout=_END_S)
