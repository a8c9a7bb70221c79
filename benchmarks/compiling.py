"""Compiles expert kernels in processes of their own, into the cache that Triton looks in before it
compiles: on a GPU's machine most cores idle, and a GPU waits for a compiler otherwise.

A worker runs the launchers on tensors without storage, for the chip that it is told of; it needs no
GPU, and loads none of CUDA.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from expert_service.kernels.triton.experts import grouped_swiglu_experts
from expert_service.kernels.triton.matrices import FP8, ExpertMatrices, scale_shape
from expert_service.kernels.triton.tables.tiles import Precision, Tiles


class Compilers(AbstractContextManager["Compilers"]):
    """A pool of compiling processes for one chip."""

    def __init__(self, processes: int, target: GPUTarget) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, spawn, _only_compile, (target,))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Forgets what has not begun, and waits for the rest."""
        self._pool.shutdown(cancel_futures=True)

    def experts(
        self,
        sizes: tuple[int, int, int],
        top_k: int,
        precision: Precision,
        tokens: int,
        tiles: Tiles,
    ) -> Future[None]:
        """All kernels of that many tokens on experts of `sizes` (L, H, I)."""
        return self._pool.submit(compile_experts, sizes, top_k, precision, tokens, tiles)


def target_here() -> GPUTarget:
    """The GPU of this process, as Triton's cache knows it."""
    found: GPUTarget = triton.runtime.driver.active.get_current_target()
    return found


def idle_cores() -> int:
    """How many processes may compile beside the one that times."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


def compile_experts(
    sizes: tuple[int, int, int], top_k: int, precision: Precision, tokens: int, tiles: Tiles
) -> None:
    """Launches on tensors without storage: in a worker of `Compilers`, which only compiles."""
    count, hidden, size = sizes
    is_fp8 = precision in ("w8a16", "w8a8")
    with torch.device("meta"):
        shapes = ((size, hidden), (size, hidden), (hidden, size))
        dtype = FP8 if is_fp8 else torch.bfloat16
        weights = [torch.empty(count, *shape, dtype=dtype) for shape in shapes]
        if is_fp8:
            weights += [torch.empty(count, *scale_shape(*shape)) for shape in shapes]
        grouped_swiglu_experts(
            torch.empty(tokens, hidden, dtype=torch.bfloat16),
            torch.empty(tokens, top_k, dtype=torch.int32),
            torch.empty(tokens, top_k),
            ExpertMatrices(*weights),
            tiles=tiles,
            w8a8=precision == "w8a8",
        )


class _NoDriver:
    """What Triton asks of a GPU's driver to compile for it, and nothing more."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def _only_compile(target: GPUTarget) -> None:
    """From now on this process launches nothing."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_NoDriver(target))
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, warmup=True, **kwargs)

    JITFunction.run = compile_only


def wait_for(futures: Iterable[Future[None]]) -> None:
    """Until all have ended. What does not compile fails again where it is launched, with a case."""
    for future in futures:
        future.exception()
