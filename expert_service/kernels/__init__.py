"""Backends: where and how a shard's experts are computed."""

from __future__ import annotations

import torch

from expert_service.backend import Backend
from expert_service.kernels.noop import NoopBackend
from expert_service.kernels.onednn import OneDnnBackend
from expert_service.kernels.reference import ReferenceBackend
from expertmesh.errors import ConfigError
from expertmesh.model import ModelSpec

__all__ = ["BACKENDS", "create_backend"]

#: Names that `create_backend` takes.
BACKENDS = ("auto", "onednn", "reference", "triton", "noop")


def create_backend(
    name: str, device: str, dtype: torch.dtype, spec: ModelSpec, threads: int
) -> Backend:
    """The backend of that name on that device; "auto" takes the fastest there is.

    `device` is "auto", "cpu" or "cuda"; `dtype` is what the experts shall compute in; `threads`
    is for the CPU. Raises ConfigError for an unknown name, or one that cannot run here.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r} is unknown; known: auto, cpu, cuda")
    if name == "triton" or device == "cuda":
        raise ConfigError(
            f"backend {name!r} on device {device!r}: the triton backend is not there yet; "
            'use device "cpu"'
        )
    if threads < 1:
        raise ConfigError(f"threads is {threads}; a backend needs at least 1")
    if name == "noop":
        return NoopBackend()
    return ReferenceBackend() if name == "reference" else OneDnnBackend(spec, dtype, threads)
