"""What each expert server asks of Ray: CPUs, memory, its GPU. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from expertmesh.errors import ConfigError
from expertmesh.model import ModelSpec, Slot

#: A router and the controller each reserve this many CPUs: enough to keep their node alive in
#: the eyes of Ray's autoscaler, too little to take a core from an expert server.
SERVICE_CPUS = 0.01
#: Ray's name of what a node offers once for each server it takes: see deploy/README.md.
EXPERT_SLOT = "expert_slot"
_LOADING_FACTOR = 1.3  # a server's peak while it loads, over its packed shard
_BASE_BYTES = 512 << 20  # Python, torch, gRPC and Ray in one process
_CUDA_BYTES = 2 << 30  # CUDA's libraries and pinned memory; an allowance, not measured
_OURS = 0.9  # of each node's CPUs: the rest is for a second cluster, or somebody's small task
_CUT = 100  # Ray counts hundredths of a CPU exactly


@dataclass(frozen=True, slots=True)
class Node:
    """What one Ray node has in all."""

    name: str
    cpus: float
    memory_bytes: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Request:
    """What one expert server asks for."""

    cpus: float
    memory_bytes: int
    gpus: float
    threads: int
    #: Units of the custom resource EXPERT_SLOT; nodes that offer it take one server for each.
    expert_slots: int = 0


def shard_bytes(spec: ModelSpec, slots: Sequence[Slot], dtype: torch.dtype) -> int:
    """Bytes of a shard's weights in the dtype that it computes in: three matrices an expert."""
    layers = {layer.index: layer for layer in spec.layers}
    rows = sum(layers[slot.layer].width(slot.expert) for slot in slots)
    return 3 * rows * spec.hidden_size * dtype.itemsize


def _host_bytes(
    parts: Sequence[Sequence[Slot]], spec: ModelSpec, dtype: torch.dtype, device: str
) -> tuple[int, int]:
    """Bytes of weights that the largest server holds in its host's memory, and of all else."""
    base, held = _BASE_BYTES, parts
    if device == "cuda":  # one expert at a time passes through the host
        base, held = _BASE_BYTES + _CUDA_BYTES, [[slot] for part in parts for slot in part]
    return max(shard_bytes(spec, part, dtype) for part in held), base


def plan_request(
    nodes: Sequence[Node], parts: Sequence[Sequence[Slot]], replicas: int, spec: ModelSpec,
    dtype: torch.dtype, device: str, services: int = 2,
) -> Request:  # fmt: skip
    """An equal request for every server, so that all of them fit on the cluster at once.

    CPUs: the most that lets every node's share of servers fit beside `services` routers and
    controllers. GPUs: one each on cuda, or an equal
    fraction where there are fewer GPUs than servers. Raises ConfigError with the arithmetic when
    memory or GPUs do not suffice.
    """
    servers = len(parts) * replicas
    gpus = 0.0
    room = [servers] * len(nodes)  # servers that each node has GPUs for
    if device == "cuda":
        gpus = _gpus(nodes, servers)
        room = [int(node.gpus) * round(1 / gpus) for node in nodes]
    largest, base = _host_bytes(parts, spec, dtype, device)
    memory = int(largest * _LOADING_FACTOR) + base
    room = [min(n, int(node.memory_bytes // memory)) for n, node in zip(room, nodes, strict=True)]
    if sum(room) < servers:
        have = ", ".join(f"{node.name}: {node.memory_bytes / 2**30:.1f} GiB" for node in nodes)
        what = "an expert" if device == "cuda" else "a shard"
        raise ConfigError(
            f"{servers} expert servers of {memory / 2**30:.1f} GiB each ({what} of "
            f"{largest / 2**30:.1f} GiB x {_LOADING_FACTOR} while loading, and "
            f"{base / 2**30:.1f} GiB) do not fit on {have}: use more shards or fewer "
            "replicas, a smaller dtype, or more nodes"
        )
    kept = services * SERVICE_CPUS  # on every node: which one the services live on is Ray's to say
    available = [max(0.0, node.cpus * _OURS - kept) for node in nodes]
    cpus = _equal_share(available, room, servers)
    return Request(cpus, memory, gpus, max(1, round(cpus / _OURS)))


def fixed_request(
    cpus: float, parts: Sequence[Sequence[Slot]], spec: ModelSpec, dtype: torch.dtype, device: str
) -> Request:
    """What every server asks for whatever nodes there are: those may come when it is asked.

    An expert slot, these CPUs, memory for the largest part, on cuda a whole GPU. Raises
    ConfigError for a number of CPUs that cannot be.
    """
    if not cpus > 0:
        raise ConfigError(f"cpus_per_server is {cpus!r}, expected a number above 0")
    largest, base = _host_bytes(parts, spec, dtype, device)
    memory = int(largest * _LOADING_FACTOR) + base
    gpus = 1.0 if device == "cuda" else 0.0
    return Request(cpus, memory, gpus, max(1, int(cpus)), expert_slots=1)


def share_of_the_rest(planned: Request, free_cpus: float, servers: int, services: int) -> Request:
    """The same request with an equal share of the CPUs that others leave free.

    Raises ConfigError when nothing is left to share.
    """
    cpus = math.floor((free_cpus - services * SERVICE_CPUS) / servers * _CUT) / _CUT
    if cpus <= 0:
        raise ConfigError(
            f"Ray has {free_cpus:.2f} CPUs free, too few for {servers} expert servers and "
            f"{services} services: other jobs, or clusters of this process, hold the others"
        )
    return replace(planned, cpus=cpus, threads=max(1, round(cpus)))


def _gpus(nodes: Sequence[Node], servers: int) -> float:
    total = sum(int(node.gpus) for node in nodes)
    if total == 0:
        raise ConfigError('device is "cuda" but no node of this Ray cluster has a GPU')
    per_gpu = math.ceil(servers / total)
    return 1.0 / per_gpu


def _equal_share(available: Sequence[float], room: Sequence[int], servers: int) -> float:
    """The largest equal request of which `servers` fit, at most `room` on each node, in
    hundredths; at least one hundredth."""
    candidates = {
        math.floor(cpus * _CUT / count) / _CUT
        for cpus in available
        for count in range(1, servers + 1)
    }
    for share in sorted(candidates, reverse=True):
        if share > 0:
            fit = (
                min(most, int(cpus / share + 1e-9))
                for cpus, most in zip(available, room, strict=True)
            )
            if sum(fit) >= servers:
                return share
    return 1.0 / _CUT
