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
def service(folder: Path, *command: str, python: str = sys.executable) -> Iterator[str]:
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
            [python, *command],
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
    checkpoint: Path,
    folder: Path,
    shards: int,
    backend: str = "auto",
    *,
    shared_memory: str = "off",
    routers: int = 1,
    router_settings: str = "",
    expert_settings: str = "",
    data_connections: str = "auto",
) -> Iterator[str]:
    """A controller, routers and `shards` expert servers of one thread; the routers' addresses.

    `shared_memory` is the routers', with the expert servers. Settings are keyword arguments of
    RouterConfig and ExpertConfig, as Python has them. Clusters of one folder differ in
    `shared_memory` or `data_connections`, which is every service's.
    """
    with whole_cluster(
        checkpoint,
        folder,
        shards,
        backend,
        shared_memory=shared_memory,
        routers=routers,
        router_settings=router_settings,
        expert_settings=expert_settings,
        data_connections=data_connections,
    ) as addresses:
        yield addresses.router


@contextmanager
def whole_cluster(
    checkpoint: Path,
    folder: Path,
    shards: int,
    backend: str = "auto",
    *,
    shared_memory: str = "off",
    routers: int = 1,
    router_settings: str = "",
    expert_settings: str = "",
    data_connections: str = "auto",
) -> Iterator[Addresses]:
    """The same, for those who need the controller, too. Servers are shard-0, shard-1, ..."""
    with ExitStack() as stack:
        start = stack.enter_context
        state = str(folder / f"state-{shared_memory}-{data_connections}.sqlite")
        controller = start(service(folder, "-m", "load_controller", "--state", state))
        link = ("--controller", controller)
        run = _with_settings("router_service", "RouterConfig", router_settings)
        ways = ("--data-connections", data_connections)
        shared = ("--shared-memory", shared_memory, *ways)
        addresses = [
            start(
                service(
                    folder, *run, str(checkpoint), "--router-id", f"router-{each}", *shared, *link
                )
            )
            for each in range(routers)
        ]
        run = _with_settings("expert_service", "ExpertConfig", expert_settings)
        for shard in range(shards):
            part = ("--shard", f"{shard}/{shards}", "--backend", backend, *ways)
            start(service(folder, *run, str(checkpoint), *part, *link))
        for address in addresses:
            _wait_ready(address, shards)
        yield Addresses(",".join(addresses), controller)


def _with_settings(module: str, config: str, settings: str) -> tuple[str, ...]:
    """The service's command, with other defaults of its configuration."""
    if not settings:
        return ("-m", module)
    return (
        "-c",
        f"""
import sys
from expertmesh import config
config.{config}.__init__.__kwdefaults__.update(dict({settings}))
from {module}.__main__ import main
sys.exit(main())
""",
    )


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
