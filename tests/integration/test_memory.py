"""Who holds expert weights, how much memory loading takes, how many bytes are read.

Memory is RssAnon: pages of a process's own, not the file-backed ones that the system can drop.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import expertmesh
from expert_service.kernels.cpu.onednn_cpu import compute_dtype
from expertmesh.checkpoint import Checkpoint
from expertmesh.placement import initial_parts
from tests.checkpoints import make_checkpoint
from tests.mesh import wait_until
from tests.processes import Service

HIDDEN = 512
SHARDS = 2
# Many experts, then few large ones, 400 MB each: beside a shard of 200 MB, the 13 MB of primitives
# that oneDNN builds for each shape of expert stay small.
SIZES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16, "n_routed_experts": 256, "moe_intermediate_size": 512},
    "fp32": {"dtype": torch.float32, "n_routed_experts": 32, "moe_intermediate_size": 2048},
    "small": {"dtype": torch.bfloat16, "n_routed_experts": 64, "moe_intermediate_size": 768},
    "tiny": {"dtype": torch.bfloat16, "n_routed_experts": 256, "moe_intermediate_size": 8},
}
_START_S = 60.0
_SAMPLE_S = 0.005
# `python -m expert_service` to the letter, but for the slots that it is given.
_EMPTY = """
import sys
from expert_service import __main__ as service
service.initial_parts = lambda spec, count: [[] for _ in range(count)]
sys.exit(service.main())
"""
_CLIENT = """
import sys, torch
from expertmesh.huggingface import load_without_experts
model = load_without_experts(sys.argv[1], sys.argv[2])
with torch.no_grad():
    logits = model(torch.arange(16)[None]).logits
model.expertmesh.close()
assert logits.isfinite().all()
print([line for line in open("/proc/self/status") if line.startswith("RssAnon")][0].split()[1])
"""


@dataclass(frozen=True)
class Saved:
    """A checkpoint of one MoE layer."""

    path: Path
    expert_bytes: int
    part_bytes: list[int]  # of each shard, shared expert included


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Saved]]:
    folders = {name: tmp_path_factory.mktemp(name) for name in SIZES}
    yield {name: _save(name, folder) for name, folder in folders.items()}
    for folder in folders.values():
        (folder / "model.safetensors").unlink()


def _save(name: str, path: Path) -> Saved:
    layer = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    make_checkpoint("deepseek_v2", path, **layer, **SIZES[name])
    with Checkpoint.open(path) as checkpoint:
        slots = list(checkpoint.spec.layers[0].slots())
        return Saved(
            path,
            sum(checkpoint.slot_bytes(slot) for slot in slots),
            [
                sum(checkpoint.slot_bytes(slot) for slot in part)
                for part in initial_parts(checkpoint.spec, SHARDS)
            ],
        )


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # it is ending


def _read_bytes(pid: int) -> int:
    """Everything that the process has read so far, the files of its modules included."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


class WatchedServer:
    """An expert server's process, its memory sampled from its first moment on."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, env=environment, text=True
        )
        self.pid = self._process.pid
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes(self.pid))

    def wait_ready(self) -> None:
        """Until its health is SERVING: loaded and warmed up."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("LISTENING "), "see standard error"
        with grpc.insecure_channel(line.split()[1]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            wait_until(
                lambda: (
                    health.Check(request, timeout=_START_S).status
                    == health_pb2.HealthCheckResponse.SERVING
                ),
                _START_S,
                "serving",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._sampler.join()
        self._process.terminate()
        self._process.communicate(timeout=_START_S)


@dataclass(frozen=True)
class Loading:
    """What it took to load a shard, compared with an empty server."""

    shard_bytes: int  # in the checkpoint
    packed_bytes: int  # as this CPU computes: float32 where it has no instructions for bfloat16
    peak_bytes: int
    idle_bytes: int
    read_bytes: int


@pytest.fixture(scope="module", params=["bf16", "fp32", "small"])
def loading(request: pytest.FixtureRequest, saved: dict[str, Saved]) -> Loading:
    checkpoint = saved[request.param]
    arguments = (str(checkpoint.path), "--shard", f"1/{SHARDS}")
    with (
        WatchedServer("-c", _EMPTY, *arguments) as empty,
        WatchedServer("-m", "expert_service", *arguments) as loaded,
    ):
        empty.wait_ready()
        loaded.wait_ready()
        base_bytes, idle_bytes = _anonymous_bytes(empty.pid), _anonymous_bytes(loaded.pid)
        stored: torch.dtype = SIZES[request.param]["dtype"]
        wider = compute_dtype(stored).itemsize // stored.itemsize
        return Loading(
            checkpoint.part_bytes[1],
            wider * checkpoint.part_bytes[1],
            max(loaded.peak_bytes, idle_bytes) - base_bytes,
            idle_bytes - base_bytes,
            _read_bytes(loaded.pid) - _read_bytes(empty.pid),
        )


def test_loading_peaks_at_little_more_than_the_packed_shard(loading: Loading) -> None:
    assert loading.idle_bytes >= 0.95 * loading.packed_bytes, "the shard is held in memory"
    assert loading.peak_bytes <= 1.3 * loading.packed_bytes


def test_a_server_reads_only_the_bytes_of_its_slots(loading: Loading) -> None:
    # Wake-ups are counted, too: some bytes more in this process, or in the empty one.
    assert abs(loading.read_bytes - loading.shard_bytes) <= 0.05 * loading.shard_bytes


@dataclass(frozen=True)
class Holding:
    """Memory of a router that has answered, and of a client that has generated through it."""

    router_bytes: int
    client_bytes: int


@pytest.fixture(scope="module")
def holding(
    saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Holding]:
    """Of the same services, serving large experts and tiny ones, at the same time."""
    names = ("bf16", "tiny")
    folders = [tmp_path_factory.mktemp("state") for _ in names]
    with ThreadPoolExecutor() as threads:
        measured = threads.map(_hold, [saved[name].path for name in names], folders)
        return dict(zip(names, measured, strict=True))


def _hold(path: Path, state: Path) -> Holding:
    with ExitStack() as stack:
        start = stack.enter_context
        controller = start(Service("load_controller", "--state", str(state / "state.sqlite")))
        link = ("--controller", controller.address)
        router = start(Service("router_service", str(path), *link))
        start(Service("expert_service", str(path), *link))
        with expertmesh.connect(router.address) as mesh:
            wait_until(lambda: mesh.status().ready, _START_S, "ready")
        command = [sys.executable, "-c", _CLIENT, str(path), router.address]
        client = subprocess.run(command, capture_output=True, text=True, timeout=_START_S)
        assert client.returncode == 0, client.stderr
        return Holding(_anonymous_bytes(router.process.pid), int(client.stdout) * 1024)


@pytest.mark.parametrize("who", ["router_bytes", "client_bytes"])
def test_neither_router_nor_client_holds_expert_weights(
    holding: dict[str, Holding], saved: dict[str, Saved], who: str
) -> None:
    more = getattr(holding["bf16"], who) - getattr(holding["tiny"], who)

    assert more < 0.1 * (saved["bf16"].expert_bytes - saved["tiny"].expert_bytes)
