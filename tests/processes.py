"""Services as processes of their own, without Ray. For tests that kill or stop them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import expertmesh
from tests.mesh import wait_until

_START_S = 120.0
_STOP_S = 20.0


class Service:
    """`python -m MODULE ...` that has said where it listens."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self.process.stdout is not None
        self.line = line = self.process.stdout.readline()
        if not line.startswith("LISTENING "):
            self.process.wait(_START_S)
            raise AssertionError(f"{self._command} ended with {self.process.returncode}")
        self.address = line.split()[1]

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.process.kill()
        self.process.wait(_STOP_S)

    def pause(self) -> None:
        """SIGSTOP: alive, and silent."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.resume()
            self.process.terminate()
            self.process.wait(_STOP_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Cluster:
    """A controller, a router, and expert servers by name."""

    def __init__(self, path: Path, controller: Service, router: Service) -> None:
        self.path = path
        self.controller = controller
        self.router = router
        self.servers: dict[str, Service] = {}

    def start_server(self, name: str, shard: str) -> Service:
        """Starts, or starts again, the server of that name."""
        service = Service(
            "expert_service", str(self.path), "--shard", shard, "--server-id", name,
            "--controller", self.controller.address,
        )  # fmt: skip
        self.servers[name] = service
        return service

    def wait_ready(self, servers: int) -> None:
        """Until that many servers are connected and every expert can be asked."""
        with expertmesh.connect(self.router.address, timeout=30.0) as mesh:

            def ready() -> bool:
                status = mesh.status()
                up = sum(s.connected and s.state == "ready" for s in status.servers)
                return status.ready and up == servers

            wait_until(ready, _START_S, f"{servers} servers ready")


@contextmanager
def cluster(path: Path, folder: Path, shards: int, replicas: int) -> Iterator[Cluster]:
    """Processes that serve a checkpoint: servers are named s0r0, s0r1, s1r0 ..."""
    with (
        Service("load_controller", "--state", str(folder / "state.sqlite")) as controller,
        Service("router_service", str(path), "--controller", controller.address) as router,
    ):
        running = Cluster(path, controller, router)
        try:
            for shard in range(shards):
                for replica in range(replicas):
                    running.start_server(f"s{shard}r{replica}", f"{shard}/{shards}")
            running.wait_ready(shards * replicas)
            yield running
        finally:
            for service in running.servers.values():
                service.__exit__(None, None, None)
