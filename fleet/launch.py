"""Launch a cluster on Ray: controller, routers, expert servers; wait until all can be asked."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expert_service.actor import ExpertServerActor, ExpertServerOptions
from expert_service.server import parse_dtype
from expertmesh.checkpoint import Checkpoint
from expertmesh.client import connect
from expertmesh.config import BalanceConfig, SharedMemoryConfig
from expertmesh.errors import ConfigError, DeadlineError, MeshError, UnavailableError
from expertmesh.model import ModelSpec, Slot
from expertmesh.placement import initial_parts
from expertmesh.v1 import router_pb2
from fleet import ray_session, state
from fleet.actors import LoadControllerActor, RouterActor, RouterOptions
from fleet.arguments import check_choices, check_counts, checked_path
from fleet.external import NODE_STALLED_S, STALLED_S, check_controller, wait_loaded
from fleet.ports import metrics_ports
from fleet.ray_session import RaySession
from fleet.resources import (
    EXPERT_SLOT,
    SERVICE_CPUS,
    Node,
    Request,
    fixed_request,
    plan_request,
    share_of_the_rest,
)

_POLL_S = 0.1
_FREE_S = 5.0  # what a cluster that has just ended held is free again within this
_STOP_S = 15.0  # a stopping actor may take this long to drain before it is killed

Progress = Callable[[router_pb2.GetStatusResponse], None]


class Cluster:
    """A running cluster. It lives until it is closed, or until the process that made it ends."""

    def __init__(self, session: RaySession, folder: Path) -> None:
        self._session = session
        self._folder = folder
        self.controller: Any = None
        self.routers: list[Any] = []
        self.servers: dict[str, Any] = {}  # actors by server id
        self.addresses: list[str] = []
        self.controller_address = ""
        self._closed = False

    @property
    def address(self) -> str:
        """ "host:port" of the router; several, separated by commas, when there are several."""
        return ",".join(self.addresses)

    def endpoints(self) -> dict[str, str]:
        """ "host:port" of every expert server, by server id."""
        asked = {name: actor.endpoint.remote() for name, actor in self.servers.items()}
        return {name: _get(ref, f"expert server {name}") for name, ref in asked.items()}

    def status(self) -> router_pb2.GetStatusResponse:
        """A router's view of the cluster."""
        with connect(self.address) as mesh:
            return mesh.status()

    def close(self) -> None:
        """Drains and ends every actor of this cluster, and Ray if it was started for it."""
        if self._closed:
            return
        self._closed = True
        for group in (self.routers, list(self.servers.values()), [self.controller]):
            _stop_all([actor for actor in group if actor is not None])
        if self.addresses:
            state.forget(self.address)
        self._session.leave()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def launch(
    checkpoint: str | Path,
    shards: int = 2,
    replicas: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    ray_address: str | None = None,
    port: int = 0,
    balance: str | BalanceConfig = "frozen",
    *,
    routers: int = 1,
    backend: str = "auto",
    weights: str = "auto",
    controller: str = "",
    cpus_per_server: float | None = None,
    metrics_port: int | None = None,
    shared_memory: str = "off",
    progress: Progress | None = None,
    command: str = "launch",
) -> Cluster:
    """Serves a checkpoint on Ray; returns when every expert can be asked (READY).

    `shards` x `replicas` expert servers are started: `replicas` copies of each of `shards` parts.
    Without `ray_address` a Ray of its own starts on this machine; with it ("auto" or "host:port")
    the servers spread over the nodes of that cluster, each of which must see the checkpoint under
    the same path. `port` 0 takes any free one; with several `routers` they get consecutive ports.
    `weights` says what becomes of an FP8 checkpoint's: see `expert_service.kernels.WEIGHTS`.
    With `device` "auto" GPUs are asked for where `backend` is "triton", and else none.
    `progress` is called with the router's view while servers load, an empty one while the router
    does not answer; what it raises ends the start. Raises ConfigError and
    CheckpointError; nothing is left behind then.

    With `controller` ("host:port" of a load controller that runs already) only expert servers are
    started; `port`, `balance` and `routers` mean nothing then, and READY is when all have loaded.
    With `cpus_per_server` each server asks for that many CPUs and an `expert_slot`, and may wait
    until Ray's autoscaler brings a node; otherwise they share out the nodes that are there.
    `metrics_port` is where `/metrics` is served: by servers with an `expert_slot` each on its own
    node, by several processes of one node on consecutive ports, as `metrics_ports` says.
    With `shared_memory` "auto" routers share memory with the expert servers of their node.
    """
    path = checked_path(checkpoint)
    check_counts(shards=shards, replicas=replicas, routers=routers)
    check_choices(port, routers, backend, device, weights)
    if device == "auto":  # said to the servers, too: Ray may show them GPUs that it gave to nobody
        device = "cuda" if backend == "triton" else "cpu"
    balance = BalanceConfig.of(balance)
    SharedMemoryConfig.of(shared_memory)  # refused before anything starts
    services = 0 if controller else routers + 1
    ports = metrics_ports(
        metrics_port,
        services=services,
        servers=shards * replicas,
        node_each=cpus_per_server is not None,
    )
    with Checkpoint.open(path) as opened:
        spec, run_dtype = opened.spec, parse_dtype(dtype, opened)
    parts = initial_parts(spec, shards)
    fixed, patience_s = None, STALLED_S
    if cpus_per_server is not None:
        patience_s = NODE_STALLED_S
        fixed = fixed_request(cpus_per_server, parts, spec, run_dtype, device)
    if controller:
        check_controller(controller)
    session = ray_session.connect(ray_address)
    # What starts with one command on one machine is advertised to that machine.
    host = "127.0.0.1" if session.local else ""
    cluster = Cluster(session, Path(tempfile.mkdtemp(prefix="expertmesh-")))
    try:
        request = fixed or _plan(parts, replicas, spec, run_dtype, device, services)
        if not controller:
            _start_services(cluster, path, run_dtype, balance, port, routers, host, ports.services,
                            shared_memory)  # fmt: skip
        template = ExpertServerOptions(
            checkpoint=str(path),
            slots=(),
            server_id="",
            controller=controller or cluster.controller_address,
            backend=backend,
            device=device,
            dtype=dtype,
            threads=request.threads,
            weights=weights,
            host=host,
        )
        cluster.servers = start_servers(parts, replicas, request, template, ports.servers)
        if controller:
            wait_loaded(cluster.servers, progress, patience_s=patience_s)
        else:
            _wait_ready(cluster, progress, patience_s)
            _remember(cluster, command)
    except BaseException:
        cluster.close()
        raise
    return cluster


def _remember(cluster: Cluster, command: str) -> None:
    """Makes it the cluster that the commands on this host find."""
    pid = os.getpid()
    state.remember(
        state.LastCluster(
            address=cluster.address, pid=pid, started=state.started(pid), command=command
        )
    )


def _plan(
    parts: Sequence[Sequence[Slot]], replicas: int, spec: ModelSpec, dtype: torch.dtype,
    device: str, services: int,
) -> Request:  # fmt: skip
    """What each server asks for: a share of the whole cluster, or of what others leave of it."""
    request = plan_request(_nodes(), parts, replicas, spec, dtype, device, services)
    servers = len(parts) * replicas
    end = time.monotonic() + _FREE_S
    while (free := ray.available_resources().get("CPU", 0.0)) < request.cpus * servers:
        if time.monotonic() > end:
            return share_of_the_rest(request, free, servers, services)
        time.sleep(_POLL_S)
    return request


def _nodes() -> list[Node]:
    return [
        Node(
            name=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            memory_bytes=node["Resources"].get("memory", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _start_services(
    cluster: Cluster, path: Path, dtype: torch.dtype, balance: BalanceConfig, port: int,
    routers: int, host: str, metrics: Sequence[int | None], shared_memory: str,
) -> None:  # fmt: skip
    """Starts controller and routers on this process's node, where their files are."""
    node_id = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # A head node may offer no CPU at all (KubeRay's usual set-up): then nothing is reserved.
    offers = next(n["Resources"].get("CPU", 0.0) for n in ray.nodes() if n["NodeID"] == node_id)
    cpus = SERVICE_CPUS if offers else 0
    options = {"num_cpus": cpus, "max_restarts": -1, "scheduling_strategy": here}
    cluster.controller = LoadControllerActor.options(**options).remote(  # type: ignore[attr-defined]
        str(cluster._folder / "controller.sqlite"), balance, host, metrics[0]
    )
    cluster.controller_address = _get(cluster.controller.address.remote(), "the load controller")
    for index in range(routers):
        router_options = RouterOptions(
            checkpoint=str(path),
            dtype=dtype,
            router_id=f"router-{index}",
            controller=cluster.controller_address,
            port=port + index if port else 0,
            host=host,
            port_file=str(cluster._folder / f"router-{index}.port"),
            metrics_port=metrics[1 + index],
            shared_memory=shared_memory,
        )
        router = RouterActor.options(**options).remote(router_options)  # type: ignore[attr-defined]
        cluster.routers.append(router)
    cluster.addresses = [_get(router.address.remote(), "a router") for router in cluster.routers]


def start_servers(
    parts: Sequence[Sequence[Slot]],
    replicas: int,
    request: Request,
    template: ExpertServerOptions,
    metrics_ports: Sequence[int | None] | None = None,
) -> dict[str, Any]:
    """One actor for each part and replica, by server id; `template` says what they share.

    `metrics_ports` has one for each, in the order in which they start; without it none has any.

    Replicas are started part after part, so that Ray's SPREAD puts the copies of a part on
    different nodes where there are several.
    """
    servers: dict[str, Any] = {}
    for replica in range(replicas):
        for index, part in enumerate(parts):
            server_id = f"shard{index}-replica{replica}"
            actor = ExpertServerActor.options(  # type: ignore[attr-defined]
                num_cpus=request.cpus,
                num_gpus=request.gpus,
                memory=request.memory_bytes,
                resources={EXPERT_SLOT: request.expert_slots} if request.expert_slots else None,
                max_restarts=-1,
                scheduling_strategy="SPREAD",
                # Ray's own choice is one thread below two CPUs; ours is what we planned with. Idle
                # threads sleep: spinning ones take the cores of the other shards on a host.
                runtime_env={
                    "env_vars": {
                        "OMP_NUM_THREADS": str(request.threads),
                        "OMP_WAIT_POLICY": "PASSIVE",
                    }
                },
            )
            port = metrics_ports[len(servers)] if metrics_ports else None
            options = replace(template, slots=tuple(part), server_id=server_id, metrics_port=port)
            servers[server_id] = actor.remote(options)
    return servers


def _get(ref: Any, what: str) -> Any:
    try:
        return ray.get(ref, timeout=STALLED_S)
    except ray.exceptions.RayTaskError as error:
        raise _cause(error, what) from None
    except ray.exceptions.GetTimeoutError:
        raise ConfigError(
            f"Ray has not started {what} for {STALLED_S:.0f} s: its CPUs may be in use by others; "
            "see `ray status`"
        ) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(f"{what} could not start: {error}") from None


def _cause(error: ray.exceptions.RayTaskError, what: str) -> MeshError:
    cause = error.cause
    return cause if isinstance(cause, MeshError) else ConfigError(f"{what} failed: {error}")


def _wait_ready(cluster: Cluster, progress: Progress | None, patience_s: float) -> None:
    """Until every router can ask for every expert. Raises what a server says it failed of, and
    ConfigError when nothing moves for `patience_s`."""
    asked = {name: actor.endpoint.remote() for name, actor in cluster.servers.items()}
    started: set[str] = set()
    waiting = list(cluster.addresses)
    last: object = None
    moved_at = time.monotonic()
    while waiting:
        for name in [name for name in asked if ray.wait([asked[name]], timeout=0)[0]]:
            _get(asked[name], f"expert server {name}")
            started.add(name)
            asked[name] = cluster.servers[name].endpoint.remote()  # it may yet fail
        status = _status_of(waiting[0])
        if progress is not None:
            progress(status or router_pb2.GetStatusResponse())
        if status is not None:
            _raise_failure(status)
            ready = sum(server.state == "ready" and server.connected for server in status.servers)
            if status.ready and ready == len(cluster.servers):
                waiting.pop(0)
                continue
        now = (len(started), [] if status is None else [
            (server.state, server.loaded_bytes, server.connected) for server in status.servers
        ])  # fmt: skip
        if now != last:
            last, moved_at = now, time.monotonic()
        if time.monotonic() - moved_at > patience_s:
            absent = sorted(cluster.servers.keys() - started)
            raise ConfigError(_stalled(absent, status, patience_s))
        time.sleep(_POLL_S)


def _status_of(address: str) -> router_pb2.GetStatusResponse | None:
    try:
        with connect(address, timeout=5.0) as mesh:
            return mesh.status()
    except (UnavailableError, DeadlineError):
        return None  # starting or busy: asked again


def _raise_failure(status: router_pb2.GetStatusResponse) -> None:
    for server in status.servers:
        if server.state == "failed":
            raise ConfigError(
                f"expert server {server.server_id} on node {server.node}: {server.error}"
            )


def _stalled(
    absent: Sequence[str], status: router_pb2.GetStatusResponse | None, after_s: float
) -> str:
    if absent:
        return (
            f"Ray has not started {', '.join(absent)} for {after_s:.0f} s: their CPUs, GPUs "
            "or memory may be in use by others; see `ray status`"
        )
    reason = "the router does not answer" if status is None else status.reason
    return f"nothing has moved for {after_s:.0f} s while starting: {reason}"


def _stop_all(actors: Sequence[Any]) -> None:
    """Asks all at once to stop, waits for all, then ends their processes."""
    stops = [actor.stop.remote() for actor in actors]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=_STOP_S)
    for actor in actors:
        ray.kill(actor)
