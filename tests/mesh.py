"""A whole cluster in this process: real gRPC on loopback, no Ray. For tests."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import expertmesh
from expert_service.server import ExpertServer, Placing
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import BalanceConfig, RebalanceConfig, RouterConfig, RpcConfig, ServerRates
from expertmesh.model import Slot
from expertmesh.placement import initial_parts
from expertmesh.rpc import loop
from load_controller.server import ControllerServer
from router_service.server import RouterServer, open_model

LOCAL = RpcConfig(host="127.0.0.1", drain_s=1.0)


@dataclass
class LocalMesh:
    """The services of one cluster, all on the shared event loop."""

    path: Path
    state: Path
    controller: ControllerServer
    routers: list[RouterServer]
    servers: list[ExpertServer]
    model: torch.nn.Module | None = None
    extra: list[ExpertServer] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Every router's address."""
        return ",".join(router.address for router in self.routers)

    def start_controller(self, state: Path) -> ControllerServer:
        """A controller that takes up that file's state."""

        async def start() -> ControllerServer:
            controller = ControllerServer(state, host="127.0.0.1", rpc=LOCAL)
            await controller.start()
            return controller

        return loop.run(start())

    def start_server(
        self, name: str, part: int, parts: int, path: Path | None = None, **options: object
    ) -> ExpertServer:
        """One more expert server, not waited for."""
        server = loop.run(
            start_server_at(
                path or self.path, self.controller.address, name, part, parts, **options
            )
        )
        self.extra.append(server)
        return server

    def is_complete(self) -> bool:
        """Whether every router can ask each of the servers that the cluster began with.

        A router is ready with one of two replicas. A test that takes that one away would be undone
        by the news that the other is ready, which says the state of both.
        """
        names = {server._placing.server_id for server in self.servers}
        return all(
            names
            <= {
                seen.server_id
                for seen in router.router.pool.statuses()
                if seen.state == "ready" and seen.connected
            }
            for router in self.routers
        )

    def wait(self, condition: str = "ready", timeout_s: float = 20.0) -> None:
        """Until every router can ask for every expert."""
        for router in self.routers:
            with expertmesh.connect(router.address) as client:
                wait_until(lambda client=client: client.status().ready, timeout_s, condition)


def wait_until(condition, timeout_s: float, what: str) -> None:  # type: ignore[no-untyped-def]
    """Polls until the condition holds; fails the test when it does not in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not {what} within {timeout_s} s")
        time.sleep(0.01)


async def start_server_at(
    path: Path, controller: str, name: str, part: int, parts: int, **options: object
) -> ExpertServer:
    """An expert server that announces itself to the controller at that address, or to nobody."""
    with Checkpoint.open(path) as opened:
        slots = initial_parts(opened.spec, parts)[part]
    return await start_server_holding(path, controller, name, slots, **options)


async def start_server_holding(
    path: Path, controller: str, name: str, slots: Sequence[Slot], **options: object
) -> ExpertServer:
    """The same for any slots."""
    server = ExpertServer(
        Checkpoint.open(path),
        slots,
        Placing(
            server_id=name,
            host="127.0.0.1",
            controller=controller,
        ),
        **{"rpc": LOCAL, **options},  # type: ignore[arg-type]
    )
    await server.start()
    return server


async def _start(
    path: Path,
    state: Path,
    shards: int,
    replicas: int,
    routers: int,
    balance: BalanceConfig,
    router_config: RouterConfig,
    router_rpc: RpcConfig,
    options: dict[str, object],
    metrics_port: int | None,
    rebalance: RebalanceConfig | None,
    server_rates: ServerRates,
) -> LocalMesh:
    controller = ControllerServer(
        state,
        host="127.0.0.1",
        balance=balance,
        rebalance=rebalance,
        server_rates=server_rates,
        rpc=LOCAL,
        metrics_port=metrics_port,
    )
    await controller.start()
    servers = [
        await start_server_at(
            path,
            controller.address,
            f"s{part}r{replica}",
            part,
            shards,
            **{"metrics_port": metrics_port, **options},
        )
        for part in range(shards)
        for replica in range(replicas)
    ]
    started = []
    for index in range(routers):
        router = RouterServer(
            open_model(path, servers[0]._dtype),
            router_id=f"router-{index}",
            controller=controller.address,
            host="127.0.0.1",
            rpc=router_rpc,
            config=router_config,
            metrics_port=metrics_port,
        )
        await router.start()
        started.append(router)
    return LocalMesh(path, state, controller, started, servers)


async def _stop(mesh: LocalMesh) -> None:
    for router in mesh.routers:
        await router.stop()
    for server in [*mesh.servers, *mesh.extra]:
        await server.stop()
    await mesh.controller.stop()
    await asyncio.sleep(0)


@contextmanager
def local_mesh(
    path: Path | str,
    shards: int = 2,
    replicas: int = 1,
    routers: int = 1,
    balance: BalanceConfig | None = None,
    router_config: RouterConfig | None = None,
    router_rpc: RpcConfig = LOCAL,
    metrics: bool = False,
    rebalance: RebalanceConfig | None = None,
    server_rates: ServerRates = "equal",
    **options: object,
) -> Iterator[LocalMesh]:
    """A cluster that serves the checkpoint; `options` go to every expert server.

    With `metrics` every service serves them on a free port.
    """
    with tempfile.TemporaryDirectory() as folder:
        mesh = loop.run(
            _start(
                Path(path),
                Path(folder) / "state.sqlite",
                shards,
                replicas,
                routers,
                balance or BalanceConfig(),
                router_config or RouterConfig(),
                router_rpc,
                options,
                0 if metrics else None,
                rebalance,
                server_rates,
            )
        )
        try:
            mesh.wait()
            wait_until(mesh.is_complete, 20.0, "ready, with every server")
            yield mesh
        finally:
            loop.run(_stop(mesh))
