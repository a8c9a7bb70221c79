"""SIGKILL for either end of shared memory in mid-request: others go on, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch

import expertmesh
from expertmesh.errors import MeshError
from tests.checkpoints import make_checkpoint
from tests.mesh import wait_until
from tests.processes import Service
from tests.ties import rows_apart

H = 64
ROWS = 4000  # 1 MiB: a few ms in every process, so that a kill hits one in flight
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
_CLIENT = """
import sys, torch, expertmesh
mesh = expertmesh.connect(sys.argv[1], shared_memory="auto")
hidden = torch.randn(int(sys.argv[2]), 64)
for _ in range(3):
    mesh.forward(hidden, 1)
print("GOING", flush=True)
while True:
    mesh.forward(hidden, 1)
"""

pytestmark = pytest.mark.chaos


class Cluster:
    """A router that shares memory with two servers that hold everything each."""

    def __init__(self, path: Path, folder: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        state = str(folder / "state.sqlite")
        self._controller = self.start("load_controller", "--state", state)
        self.router = self.start_router("0")
        self.servers = {name: self.start_server(name) for name in ("s0", "s1")}
        self.wait_shared()

    def rows(self, seed: int) -> torch.Tensor:
        """Rows of the MoE layer, the same for the same seed, none of them near a tie."""
        return rows_apart(self._path, 1, ROWS, seed)

    def start(self, module: str, *arguments: str) -> Service:
        return self._stack.enter_context(Service(module, *arguments))

    def start_router(self, port: str) -> Service:
        return self.start(
            "router_service", str(self._path), "--controller", self._controller.address,
            "--port", port, "--shared-memory", "auto",
        )  # fmt: skip

    def start_server(self, name: str) -> Service:
        return self.start(
            "expert_service", str(self._path), "--shard", "0/1", "--server-id", name,
            "--controller", self._controller.address,
        )  # fmt: skip

    def wait_shared(self) -> None:
        """Until both servers are connected, by shared memory."""
        with expertmesh.connect(self.router.address, timeout=60.0) as mesh:
            wait_until(
                lambda: [s.transport for s in mesh.status().servers if s.connected] == ["shm"] * 2,
                60.0,
                "two servers by shared memory",
            )

    def pids(self) -> list[int]:
        return [service.process.pid for service in (self.router, *self.servers.values())]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Cluster, torch.nn.Module]]:
    model = make_checkpoint("deepseek_v3", tmp_path / "checkpoint")
    with ExitStack() as stack:
        yield Cluster(tmp_path / "checkpoint", tmp_path, stack), model


def truth(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.model.layers[1].mlp(hidden[None])[0]  # type: ignore[union-attr, index]
    return output


def held(pid: int) -> tuple[int, int]:
    """(mappings, open files) of shared memory that a process has."""
    files = Path(f"/proc/{pid}/fd")
    links = []
    for name in os.listdir(files):
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(files / name))
    maps = Path(f"/proc/{pid}/maps").read_text()
    return maps.count("memfd:expertmesh"), sum("memfd:expertmesh" in link for link in links)


def named() -> list[str]:
    return sorted(os.listdir("/dev/shm"))


def going_client(address: str) -> subprocess.Popen[str]:
    """A process whose requests never cease, once it has been answered through shared memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CLIENT, address, str(ROWS)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "GOING\n"
    return process


def test_a_client_that_is_killed_leaves_nothing_in_the_router(cluster) -> None:
    running, model = cluster
    before, files = [held(pid) for pid in running.pids()], named()
    hidden = running.rows(0)

    with expertmesh.connect(running.router.address, shared_memory="auto") as survivor:
        survivor.forward(hidden, 1)
        with_survivor = held(running.router.process.pid)
        for _ in range(3):
            process = going_client(running.router.address)
            wait_until(
                lambda: held(running.router.process.pid)[0] == with_survivor[0] + 1,
                10.0,
                "one client's more, and no earlier victim's",
            )
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            torch.testing.assert_close(survivor.forward(hidden, 1), truth(model, hidden), **CLOSE)
        wait_until(
            lambda: held(running.router.process.pid) == with_survivor, 10.0, "the victims' gone"
        )
    wait_until(lambda: [held(pid) for pid in running.pids()] == before, 10.0, "as before")

    assert named() == files


def test_a_router_that_is_killed_leaves_nothing_in_client_and_servers(cluster) -> None:
    running, model = cluster
    files, hidden = named(), running.rows(0)
    port = running.router.address.rpartition(":")[2]
    mine = held(os.getpid())

    with (
        expertmesh.connect(running.router.address, shared_memory="auto") as mesh,
        ThreadPoolExecutor(8) as threads,
    ):
        mesh.forward(hidden, 1)
        client = held(os.getpid())
        calls = [threads.submit(mesh.forward, hidden, 1, timeout=60.0) for _ in range(16)]
        running.router.kill()
        servers = [service.process.pid for service in running.servers.values()]
        wait_until(
            lambda: [held(pid) for pid in servers] == [(0, 0)] * 2, 10.0, "the router's gone"
        )
        running.router = running.start_router(port)
        for call in calls:
            torch.testing.assert_close(call.result(60.0), truth(model, hidden), **CLOSE)
        running.wait_shared()
        for _ in range(3):
            mesh.forward(hidden, 1)
        wait_until(lambda: held(os.getpid()) == client, 10.0, "only the new stream's memory")
    wait_until(lambda: held(os.getpid()) == mine, 10.0, "none")

    assert named() == files


def test_a_server_that_is_killed_costs_no_answer_and_leaves_nothing_in_the_router(cluster) -> None:
    running, model = cluster
    files, hidden = named(), running.rows(0)
    before = held(running.router.process.pid)

    with (
        expertmesh.connect(running.router.address, shared_memory="auto") as mesh,
        ThreadPoolExecutor(8) as threads,
    ):
        calls = [threads.submit(mesh.forward, hidden, 1, timeout=60.0) for _ in range(24)]
        running.servers["s0"].kill()
        for call in calls:
            torch.testing.assert_close(call.result(60.0), truth(model, hidden), **CLOSE)
        running.servers["s0"] = running.start_server("s0")
        running.wait_shared()
        torch.testing.assert_close(mesh.forward(hidden, 1), truth(model, hidden), **CLOSE)
    wait_until(lambda: held(running.router.process.pid) == before, 10.0, "as before")

    assert named() == files


def test_a_server_that_is_stopped_and_resumed_meets_no_block_of_a_later_frame(cluster) -> None:
    """What a silent server had is hedged elsewhere; when it wakes, it still reads and writes."""
    running, model = cluster
    inputs = [running.rows(seed) for seed in range(12)]

    with (
        expertmesh.connect(running.router.address, shared_memory="auto") as mesh,
        ThreadPoolExecutor(6) as threads,
    ):
        calls = [threads.submit(mesh.forward, hidden, 1, timeout=60.0) for hidden in inputs]
        running.servers["s0"].process.send_signal(signal.SIGSTOP)
        answers = [call.result(60.0) for call in calls[:6]]
        running.servers["s0"].process.send_signal(signal.SIGCONT)
        answers += [call.result(60.0) for call in calls[6:]]
        again = [mesh.forward(hidden, 1) for hidden in inputs]

    for hidden, first, second in zip(inputs, answers, again, strict=True):
        torch.testing.assert_close(first, truth(model, hidden), **CLOSE)
        torch.testing.assert_close(second, truth(model, hidden), **CLOSE)


def test_errors_in_mid_stream_keep_no_memory(cluster) -> None:
    running, _ = cluster
    wrong = torch.randn(ROWS, H + 1)

    with expertmesh.connect(running.router.address, shared_memory="auto") as mesh:
        mesh.forward(torch.randn(ROWS, H), 1)
        (link,) = mesh._mesh._links.values()
        lender = link._stream._lender
        for _ in range(300):  # 600 MiB, were they kept
            with pytest.raises(MeshError):
                mesh.forward(wrong, 1)
        wait_until(lambda: lender.lent_bytes == 0, 10.0, "returned")

        assert lender.full == 0
