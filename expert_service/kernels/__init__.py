"""Backends: where and how a shard's experts are computed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from expert_service.backend import Backend
from expert_service.kernels.cpu.onednn import OneDnnBackend
from expert_service.kernels.noop import NoopBackend
from expert_service.kernels.reference import ReferenceBackend
from expertmesh.errors import ConfigError
from expertmesh.model import ModelSpec, Slot

__all__ = ["BACKENDS", "DEVICES", "WEIGHTS", "create_backend"]

#: Names that `create_backend` takes.
BACKENDS = ("auto", "onednn", "reference", "triton", "noop")
DEVICES = ("auto", "cpu", "cuda")
#: What becomes of the weights. An FP8 checkpoint's stay FP8 in memory and are multiplied with
#: activations of the model's dtype (fp8-w8a16), or with ones that are rounded to FP8, too
#: (fp8-w8a8: faster for large batches, less exact); or they are read in the model's dtype
#: (dequantised). "auto" is the first where the backend and the GPU can, else the last. On the CPU
#: any checkpoint's can be rounded to 8-bit integers (int8): half of bfloat16's memory, less exact.
#: Other checkpoints know "auto" and "int8" only.
WEIGHTS = ("auto", "fp8-w8a16", "fp8-w8a8", "dequantised", "int8")

_MIN_CAPABILITY = (8, 0)  # bf16 matrix units
_FP8_CAPABILITY = (8, 9)  # Triton converts e4m3 from here on


def create_backend(
    name: str,
    device: str,
    dtype: torch.dtype,
    spec: ModelSpec,
    threads: int,
    *,
    weights: str = "auto",
    planned: Mapping[Slot, bool] | None = None,
) -> Backend:
    """The backend of that name on that device; "auto" takes triton on cuda and onednn on the cpu.

    `device` is one of DEVICES; `dtype` is what the experts shall compute in; `threads` is for the
    CPU; `weights` is one of WEIGHTS; `planned` says which slots will be loaded, and of each whether
    the checkpoint has it in FP8. Raises ConfigError for an unknown name, or one that cannot run.
    """
    for what, value, known in (
        ("backend", name, BACKENDS),
        ("device", device, DEVICES),
        ("weights", weights, WEIGHTS),
    ):
        if value not in known:
            raise ConfigError(f"{what} {value!r} is unknown; known: {', '.join(known)}")
    if threads < 1:
        raise ConfigError(f"threads is {threads}; a backend needs at least 1")
    planned = planned or {}
    if weights.startswith("fp8") and planned and not any(planned.values()):
        raise ConfigError(
            f"weights is {weights!r}, but this checkpoint has no FP8 weights in blocks of 128 x "
            '128: use "auto"'
        )
    if name == "auto":
        name = "onednn" if device == "cpu" or (device == "auto" and _no_gpu()) else "triton"
    if weights == "int8" and name != "onednn":
        raise ConfigError(
            f'weights is "int8", which backend "onednn" alone has, not {name!r}: use device "cpu"'
        )
    if name == "triton":
        return _create_triton(device, dtype, spec, weights, planned)
    if device == "cuda":
        raise ConfigError(
            f'backend {name!r} runs on the cpu only: on device "cuda" use "triton" or "auto"'
        )
    if weights.startswith("fp8"):
        raise ConfigError(
            f"weights is {weights!r}, but backend {name!r} computes in {dtype}: use "
            '"dequantised", or backend "triton"'
        )
    if name == "noop":
        return NoopBackend()
    if name == "reference":
        return ReferenceBackend()
    return OneDnnBackend(spec, dtype, threads, weights)


def _create_triton(
    device: str, dtype: torch.dtype, spec: ModelSpec, weights: str, planned: Mapping[Slot, bool]
) -> Backend:
    no_gpu = _no_gpu()
    if device == "cuda" and no_gpu:
        raise ConfigError(f'device "cuda" cannot be used: {no_gpu}; use device "cpu"')
    if importlib.util.find_spec("triton") is None:
        raise ConfigError('backend "triton" needs the package triton: pip install triton')
    # Here, so that nobody else imports Triton.
    from expert_service.kernels.triton.backend.backend import TritonBackend
    from expert_service.kernels.triton.backend.device import (
        CudaDevice,
        InterpreterDevice,
        is_interpreting,
    )

    on_gpu = not no_gpu and device != "cpu"
    if not on_gpu and not is_interpreting():
        raise ConfigError(
            f'backend "triton" needs a GPU: {no_gpu or "device is cpu"}; use backend "onednn" (or, '
            "to test kernels slowly, set TRITON_INTERPRET=1)"
        )
    if on_gpu and is_interpreting():
        raise ConfigError('TRITON_INTERPRET is set: unset it, or use device "cpu"')
    has_fp8 = not on_gpu or torch.cuda.get_device_capability() >= _FP8_CAPABILITY
    if weights.startswith("fp8") and not has_fp8:
        raise ConfigError(
            f"weights is {weights!r}, but {torch.cuda.get_device_name()} has no FP8: use "
            '"dequantised"'
        )
    takes_fp8 = has_fp8 and weights != "dequantised"
    return TritonBackend(
        spec,
        dtype,
        CudaDevice() if on_gpu else InterpreterDevice(),
        {slot: fp8 and takes_fp8 for slot, fp8 in planned.items()},
        takes_fp8=takes_fp8,
        w8a8=weights == "fp8-w8a8",
    )


def _no_gpu() -> str:
    """Why there is no GPU that the kernels run on; empty where there is one."""
    if not torch.cuda.is_available():
        return "this process sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        least, has = (".".join(map(str, pair)) for pair in (_MIN_CAPABILITY, capability))
        return f"{torch.cuda.get_device_name()} has compute capability {has}, less than {least}"
    return ""
