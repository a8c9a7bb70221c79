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
from expert_service.kernels import BACKENDS, WEIGHTS
from expert_service.server import parse_dtype
from expertmesh.checkpoint import Checkpoint
from expertmesh.client import connect
from expertmesh.config import BalanceConfig
from expertmesh.errors import ConfigError, DeadlineError, MeshError, UnavailableError
from expertmesh.model import ModelSpec, Slot
from expertmesh.placement import initial_parts
from expertmesh.v1 import router_pb2
from fleet import ray_session, state
from fleet.actors import LoadControllerActor, RouterActor, RouterOptions
from fleet.ray_session import RaySession
from fleet.resources import SERVICE_CPUS, Node, Request, plan_request, share_of_the_rest

_POLL_S = 0.1
_STALLED_S = 180.0  # nothing new for this long while starting: give up and say what is missing
_LAST_PORT = 65535
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
        self._closed = False

    @property
    def address(self) -> str:
        """ "host:port" of the router; several, separated by commas, when there are several."""
        return ",".join(self.addresses)

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
    `progress` is called with the router's view while servers load. Raises ConfigError and
    CheckpointError; nothing is left behind then.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise ConfigError(f"checkpoint is {checkpoint!r}, expected the path of a folder")
    path = Path(checkpoint).expanduser().resolve()
    _check_count("shards", shards)
    _check_count("replicas", replicas)
    _check_count("routers", routers)
    if not isinstance(port, int) or not 0 <= port <= _LAST_PORT - routers + 1:
        raise ConfigError(f"port is {port!r}, expected 0 to {_LAST_PORT}")
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, expected auto, cpu or cuda")
    if weights not in WEIGHTS:
        raise ConfigError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    if device == "auto":  # said to the servers, too: Ray may show them GPUs that it gave to nobody
        device = "cuda" if backend == "triton" else "cpu"
    balance = BalanceConfig.of(balance)
    with Checkpoint.open(path) as opened:
        spec, run_dtype = opened.spec, parse_dtype(dtype, opened)
    parts = initial_parts(spec, shards)
    session = ray_session.connect(ray_address)
    # What starts with one command on one machine is advertised to that machine.
    host = "127.0.0.1" if session.local else ""
    cluster = Cluster(session, Path(tempfile.mkdtemp(prefix="expertmesh-")))
    try:
        request = _plan(parts, replicas, spec, run_dtype, device, routers + 1)
        controller = _start_services(cluster, path, run_dtype, balance, port, routers, host)
        template = ExpertServerOptions(
            checkpoint=str(path),
            slots=(),
            server_id="",
            controller=controller,
            backend=backend,
            device=device,
            dtype=dtype,
            threads=request.threads,
            weights=weights,
            host=host,
        )
        cluster.servers = start_servers(parts, replicas, request, template)
        _wait_ready(cluster, progress)
    except BaseException:
        cluster.close()
        raise
    pid = os.getpid()
    state.remember(
        state.LastCluster(
            address=cluster.address, pid=pid, started=state.started(pid), command=command
        )
    )
    return cluster


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}, expected an integer of at least 1")


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
    routers: int, host: str,
) -> str:  # fmt: skip
    """Starts controller and routers on this process's node, where their files are; returns the
    controller's address."""
    node_id = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # A head node may offer no CPU at all (KubeRay's usual set-up): then nothing is reserved.
    offers = next(n["Resources"].get("CPU", 0.0) for n in ray.nodes() if n["NodeID"] == node_id)
    cpus = SERVICE_CPUS if offers else 0
    options = {"num_cpus": cpus, "max_restarts": -1, "scheduling_strategy": here}
    cluster.controller = LoadControllerActor.options(**options).remote(  # type: ignore[attr-defined]
        str(cluster._folder / "controller.sqlite"), balance, host
    )
    controller: str = _get(cluster.controller.address.remote(), "the load controller")
    for index in range(routers):
        router_options = RouterOptions(
            checkpoint=str(path),
            dtype=dtype,
            router_id=f"router-{index}",
            controller=controller,
            port=port + index if port else 0,
            host=host,
            port_file=str(cluster._folder / f"router-{index}.port"),
        )
        router = RouterActor.options(**options).remote(router_options)  # type: ignore[attr-defined]
        cluster.routers.append(router)
    cluster.addresses = [_get(router.address.remote(), "a router") for router in cluster.routers]
    return controller


def start_servers(
    parts: Sequence[Sequence[Slot]],
    replicas: int,
    request: Request,
    template: ExpertServerOptions,
) -> dict[str, Any]:
    """One actor for each part and replica, by server id; `template` says what they share.

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
            options = replace(template, slots=tuple(part), server_id=server_id)
            servers[server_id] = actor.remote(options)
    return servers


def _get(ref: Any, what: str) -> Any:
    try:
        return ray.get(ref, timeout=_STALLED_S)
    except ray.exceptions.RayTaskError as error:
        raise _cause(error, what) from None
    except ray.exceptions.GetTimeoutError:
        raise ConfigError(
            f"Ray has not started {what} for {_STALLED_S:.0f} s: its CPUs may be in use by others; "
            "see `ray status`"
        ) from None
    except ray.exceptions.RayError as error:
        raise ConfigError(f"{what} could not start: {error}") from None


def _cause(error: ray.exceptions.RayTaskError, what: str) -> MeshError:
    cause = error.cause
    return cause if isinstance(cause, MeshError) else ConfigError(f"{what} failed: {error}")


def _wait_ready(cluster: Cluster, progress: Progress | None) -> None:
    """Until every router can ask for every expert. Raises what a server says it failed of."""
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
        if status is not None:
            _raise_failure(status)
            if progress is not None:
                progress(status)
            ready = sum(server.state == "ready" and server.connected for server in status.servers)
            if status.ready and ready == len(cluster.servers):
                waiting.pop(0)
                continue
        now = (len(started), [] if status is None else [
            (server.state, server.loaded_bytes, server.connected) for server in status.servers
        ])  # fmt: skip
        if now != last:
            last, moved_at = now, time.monotonic()
        if time.monotonic() - moved_at > _STALLED_S:
            raise ConfigError(_stalled(sorted(cluster.servers.keys() - started), status))
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


def _stalled(absent: Sequence[str], status: router_pb2.GetStatusResponse | None) -> str:
    if absent:
        return (
            f"Ray has not started {', '.join(absent)} for {_STALLED_S:.0f} s: their CPUs, GPUs "
            "or memory may be in use by others; see `ray status`"
        )
    reason = "the router does not answer" if status is None else status.reason
    return f"nothing has moved for {_STALLED_S:.0f} s while starting: {reason}"


def _stop_all(actors: Sequence[Any]) -> None:
    """Asks all at once to stop, waits for all, then ends their processes."""
    stops = [actor.stop.remote() for actor in actors]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=_STOP_S)
    for actor in actors:
        ray.kill(actor)
