"""The services of one cluster, and an echo server, as processes without Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import expertmesh

_ROOT = Path(__file__).parents[1]
_READY_S = 120.0
_STOP_S = 20.0


@contextmanager
def service(folder: Path, *command: str) -> Iterator[str]:
    """`python COMMAND` with one thread that sleeps when idle; yields where it listens."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    log = folder / "services.log"
    with (
        log.open("a") as errors,
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("LISTENING "):
                raise RuntimeError(f"{command} did not start:\n{log.read_text()}")
            yield line.split()[1]
        finally:
            process.terminate()
            process.wait(_STOP_S)


class Addresses(NamedTuple):
    """Where a cluster is asked, and where it is told."""

    router: str
    controller: str


@contextmanager
def cluster(
    checkpoint: Path, folder: Path, shards: int, backend: str = "auto", shared_memory: str = "off"
) -> Iterator[str]:
    """A controller, a router and `shards` expert servers of one thread; the router's address.

    `shared_memory` is the router's, with the expert servers.
    """
    with whole_cluster(checkpoint, folder, shards, backend, shared_memory) as addresses:
        yield addresses.router


@contextmanager
def whole_cluster(
    checkpoint: Path, folder: Path, shards: int, backend: str = "auto", shared_memory: str = "off"
) -> Iterator[Addresses]:
    """The same, for those who need the controller, too. Servers are shard-0, shard-1, ..."""
    with ExitStack() as stack:
        start = stack.enter_context
        state = str(folder / f"state-{shared_memory}.sqlite")
        controller = start(service(folder, "-m", "load_controller", "--state", state))
        link = ("--controller", controller)
        router = start(service(folder, "-m", "router_service", str(checkpoint),
                               "--shared-memory", shared_memory, *link))  # fmt: skip
        for shard in range(shards):
            part = ("--shard", f"{shard}/{shards}", "--backend", backend)
            start(service(folder, "-m", "expert_service", str(checkpoint), *part, *link))
        _wait_ready(router, shards)
        yield Addresses(router, controller)


@contextmanager
def echo_over_two_hops(folder: Path, servers: int) -> Iterator[str]:
    """A relay before that many echo servers: the relay's address."""
    script = str(Path(__file__).parent / "echo.py")
    with ExitStack() as stack:
        echoes = [stack.enter_context(service(folder, script)) for _ in range(servers)]
        yield stack.enter_context(service(folder, script, *echoes))


def _wait_ready(router: str, shards: int) -> None:
    end = time.monotonic() + _READY_S
    with expertmesh.connect(router, timeout=_READY_S) as mesh:
        while True:
            status = mesh.status()
            if status.ready and sum(server.connected for server in status.servers) == shards:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"not ready after {_READY_S:.0f} s: {status.reason}")
            time.sleep(0.05)
