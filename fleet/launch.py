"""Launch a cluster on Ray: controller, routers, expert servers; wait until all can be asked."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expert_service.actor import ExpertServerActor, ExpertServerOptions
from expert_service.server import parse_dtype
from expertmesh.checkpoint import Checkpoint
from expertmesh.config import (
    AutoscaleConfig,
    BalanceConfig,
    DataConnectionMode,
    RebalanceConfig,
    RouterConfig,
    ServerRates,
    SharedMemoryConfig,
    WireDtype,
    check_server_rates,
)
from expertmesh.errors import ConfigError
from expertmesh.model import ModelSpec, Slot
from expertmesh.placement import initial_parts
from fleet import ray_session, state
from fleet.actors import LoadControllerActor, RouterActor, RouterOptions
from fleet.arguments import (
    check_autoscale,
    check_choices,
    check_counts,
    check_ray_address,
    check_seconds,
    checked_path,
)
from fleet.cluster import Cluster
from fleet.external import check_controller, wait_loaded
from fleet.ports import metrics_ports
from fleet.ready import NODE_STALLED_S, STALLED_S, Progress, get, wait_ready
from fleet.resources import (
    SERVICE_CPUS,
    Node,
    Request,
    fixed_request,
    plan_request,
    share_of_the_rest,
)
from fleet.roster import Roster, namespace_of, server_options
from fleet.steps import step
from fleet.supervisor_actor import SUPERVISOR, SupervisorActor, SupervisorOptions

_POLL_S = 0.1
#: Six times what makes a server lost, and longer than a process is held up by its host: a restart
#: costs the loading of a shard.
HUNG_AFTER_S = 30.0
_FREE_S = 5.0  # what a cluster that has just ended held is free again within this


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
    numa: str = "off",
    controller: str = "",
    cpus_per_server: float | None = None,
    metrics_port: int | None = None,
    autoscale: AutoscaleConfig | None = None,
    rebalance: RebalanceConfig | None = None,
    server_rates: ServerRates = "equal",
    shared_memory: str = "off",
    data_connections: DataConnectionMode = "auto",
    wire_dtype: WireDtype | None = None,
    hung_after_s: float = HUNG_AFTER_S,
    progress: Progress | None = None,
    command: str = "launch",
) -> Cluster:
    """Serves a checkpoint on Ray; returns when every expert can be asked (READY).

    `shards` x `replicas` expert servers are started: `replicas` copies of each of `shards` parts.
    Without `ray_address` a Ray of its own starts on this machine; with it ("auto" or "host:port")
    the servers spread over the nodes of that cluster, each of which must see the checkpoint under
    the same path. `port` 0 takes any free one; with several `routers` they get consecutive ports.
    `weights` says what becomes of them, "int8" for instance: see `expert_service.kernels.WEIGHTS`.
    `numa` "auto" spreads servers over a host's NUMA nodes, each pinned to one.
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

    With `autoscale` a supervisor adds and removes servers as the load asks for, beginning with
    `shards` x `replicas`; it needs `ray_address` and `cpus_per_server`. A server takes at most the
    slots of one part. With `rebalance` experts move between servers by themselves, where some have
    more to do than others; with `server_rates` "measured" a faster server gets more of the work
    (CPUs and GPUs together, for instance). See docs/operations.md. With `shared_memory` "auto"
    routers share memory with the expert servers of their node. With `data_connections` "off" gRPC
    carries every byte; else TCP connections beside its streams do. `wire_dtype` is what hidden
    states and partial sums travel as between routers and expert servers, "bfloat16" for instance
    (docs/protocol.md has the error); None for the caller's own type.

    A server, router or controller that answers nothing for `hung_after_s` is ended, and Ray starts
    it anew; 0 for never. See docs/operations.md.
    """
    path = checked_path(checkpoint)
    check_counts(shards=shards, replicas=replicas, routers=routers)
    check_choices(port, routers, backend, device, weights)
    check_ray_address(ray_address)
    check_seconds(hung_after_s=hung_after_s)
    if device == "auto":  # said to the servers, too: Ray may show them GPUs that it gave to nobody
        device = "cuda" if backend == "triton" else "cpu"
    balance = BalanceConfig.of(balance)
    check_server_rates(server_rates)
    if autoscale is not None:
        check_autoscale(autoscale, shards, replicas, ray_address, cpus_per_server, rebalance)
    between = RouterConfig(  # refused before anything starts
        shared_memory=SharedMemoryConfig.of(shared_memory),
        data_connections=data_connections,
        wire_dtype=wire_dtype,
    )
    services = 0 if controller else routers + 1
    ports = metrics_ports(
        metrics_port,
        services=services,
        servers=shards * replicas,
        node_each=cpus_per_server is not None,
    )
    with Checkpoint.open(path) as opened:
        spec, run_dtype = opened.spec, parse_dtype(dtype, opened)
    held_dtype = torch.int8 if weights == "int8" else run_dtype
    parts = initial_parts(spec, shards)
    fixed, patience_s = None, STALLED_S
    if cpus_per_server is not None:
        patience_s = NODE_STALLED_S
        fixed = fixed_request(cpus_per_server, parts, spec, held_dtype, device)
    if controller:
        check_controller(controller)
    session = ray_session.connect(ray_address)
    # What starts with one command on one machine is advertised to that machine.
    host = "127.0.0.1" if session.local else ""
    cluster = Cluster(session)
    with ExitStack() as undo:
        undo.push(step("closing a cluster that did not start", cluster.close))
        folder = cluster.make_folder()
        request = fixed or _plan(parts, replicas, spec, held_dtype, device, services)
        if not controller:
            _start_services(cluster, folder, path, run_dtype, balance, rebalance, server_rates,
                            between, port, routers, host, ports.services)  # fmt: skip
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
            numa=numa,
            data_connections=data_connections,
            host=host,
        )
        if autoscale is None:
            start_servers(parts, replicas, request, template, ports.servers, cluster.servers)
        else:
            options = SupervisorOptions(
                checkpoint=str(path),
                shards=shards,
                controller=template.controller,
                config=autoscale,
                roster=Roster(
                    namespace=namespace_of(template.controller),
                    request=request,
                    template=template,
                    metrics_port=metrics_port,
                ),
            )
            _start_supervised(cluster, parts, replicas, options)
        if controller:
            wait_loaded(cluster._started, progress, patience_s=patience_s)
        else:
            wait_ready(cluster._started, cluster.addresses, progress, patience_s)
            _remember(cluster, command)
        if hung_after_s:
            cluster.watch_over(template.controller, hung_after_s)
        undo.pop_all()
    return cluster


def _start_supervised(
    cluster: Cluster, parts: Sequence[Sequence[Slot]], replicas: int, options: SupervisorOptions
) -> None:
    """The first servers, and the supervisor, which ends with this process. Raises ConfigError where
    there is one already."""
    namespace = options.roster.namespace
    try:
        cluster.supervisor = SupervisorActor.options(  # type: ignore[attr-defined]
            name=SUPERVISOR, namespace=namespace, **_beside_us()
        ).remote(options)
    except ValueError:
        raise ConfigError(
            f"a supervisor runs already for the load controller at {options.controller}: close the "
            "cluster that was launched for it first"
        ) from None
    cluster.roster = options.roster
    for name, slots in named_parts(parts, replicas):
        cluster._started[name] = options.roster.start(name, slots)


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
    cluster: Cluster, folder: Path, path: Path, dtype: torch.dtype, balance: BalanceConfig,
    rebalance: RebalanceConfig | None, server_rates: ServerRates, config: RouterConfig, port: int,
    routers: int, host: str, metrics: Sequence[int | None],
) -> None:  # fmt: skip
    """Starts controller and routers on this process's node, where their files are."""
    options = _beside_us()
    cluster.controller = LoadControllerActor.options(**options).remote(  # type: ignore[attr-defined]
        str(folder / "controller.sqlite"),
        balance,
        rebalance,
        server_rates,
        host,
        metrics[0],
    )
    cluster.controller_address = get(cluster.controller.address.remote(), "the load controller")
    for index in range(routers):
        router_options = RouterOptions(
            checkpoint=str(path),
            dtype=dtype,
            router_id=f"router-{index}",
            controller=cluster.controller_address,
            port=port + index if port else 0,
            host=host,
            port_file=str(folder / f"router-{index}.port"),
            metrics_port=metrics[1 + index],
            config=config,
        )
        router = RouterActor.options(**options).remote(router_options)  # type: ignore[attr-defined]
        cluster.routers.append(router)
    cluster.addresses = [get(router.address.remote(), "a router") for router in cluster.routers]


def _beside_us() -> dict[str, Any]:
    """What a service asks of Ray that shall run on this process's node."""
    node_id = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # A head node may offer no CPU at all (KubeRay's usual set-up): then nothing is reserved.
    offers = next(n["Resources"].get("CPU", 0.0) for n in ray.nodes() if n["NodeID"] == node_id)
    cpus = SERVICE_CPUS if offers else 0
    return {"num_cpus": cpus, "max_restarts": -1, "scheduling_strategy": here}


def named_parts(parts: Sequence[Sequence[Slot]], replicas: int) -> list[tuple[str, Sequence[Slot]]]:
    """What each server of a launch is called and holds, in the order in which they start.

    Replicas are started part after part, so that Ray's SPREAD puts the copies of a part on
    different nodes where there are several.
    """
    return [
        (f"shard{index}-replica{replica}", part)
        for replica in range(replicas)
        for index, part in enumerate(parts)
    ]


def start_servers(
    parts: Sequence[Sequence[Slot]],
    replicas: int,
    request: Request,
    template: ExpertServerOptions,
    metrics_ports: Sequence[int | None] | None = None,
    servers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One actor for each part and replica, by server id; `template` says what they share.

    `metrics_ports` has one for each, in the order in which they start; without it none has any.
    They are put into `servers`, each as soon as it is asked for, where that is given.
    """
    servers = {} if servers is None else servers
    for server_id, part in named_parts(parts, replicas):
        actor = ExpertServerActor.options(**server_options(request))  # type: ignore[attr-defined]
        port = metrics_ports[len(servers)] if metrics_ports else None
        options = replace(template, slots=tuple(part), server_id=server_id, metrics_port=port)
        servers[server_id] = actor.remote(options)
    return servers
