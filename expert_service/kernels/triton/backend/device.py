"""The seam between the Triton backend and what only a GPU has: streams, events, pinned memory,
graphs. On the CPU, under Triton's interpreter, each of them is the plain thing it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from enum import Enum
from typing import Protocol

import torch
import triton

Run = Callable[[], None]


def is_interpreting() -> bool:
    """Whether kernels run under Triton's interpreter, on the CPU: TRITON_INTERPRET."""
    return bool(triton.knobs.runtime.interpret)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory ran out: torch's allocator, or CUDA beneath it, says so."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


class Lane(Enum):
    """What may go on at the same time."""

    COPY_IN = "copy in"
    COMPUTE = "compute"
    COPY_OUT = "copy out"


class Mark(Protocol):
    """A point in the work of one lane."""

    def wait(self) -> None:
        """The current lane goes on only after this point; the host does not wait."""
        ...

    def synchronize(self) -> None:
        """The host waits until this point is reached."""
        ...


class Device(Protocol):
    """Where kernels run. Used by one thread; `on` is for any."""

    name: str
    chip: str  # as CUDA names it; empty where there is none
    torch_device: torch.device
    compiles: bool  # kernels must be warmed up before the first request

    def free_bytes(self) -> int | None:
        """Memory that can still be had; None where nothing bounds it."""
        ...

    def host_bytes(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] on the host that can be copied from and to in the background."""
        ...

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        """Work that is started within goes to that lane."""
        ...

    def mark(self) -> Mark:
        """The current lane's work up to here."""
        ...

    def record(self, run: Run) -> Run:
        """`run` as something that can be repeated at little cost, with the same tensors.

        `run` must have been called before, and does nothing but start work on the device.
        """
        ...


class _Reached:
    """A point that is reached as soon as it is marked."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class InterpreterDevice:
    """The CPU under Triton's interpreter: everything happens at once, in order."""

    name = "cpu"
    chip = ""
    torch_device = torch.device("cpu")
    compiles = False

    def free_bytes(self) -> int | None:
        """See Device."""
        return None

    def host_bytes(self, num_bytes: int) -> torch.Tensor:
        """See Device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        """See Device."""
        return nullcontext()

    def mark(self) -> Mark:
        """See Device."""
        return _Reached()

    def record(self, run: Run) -> Run:
        """See Device."""
        return run


class CudaDevice:
    """The process's first visible GPU."""

    name = "cuda"
    torch_device = torch.device("cuda", 0)
    compiles = True

    def __init__(self) -> None:
        self.chip = torch.cuda.get_device_name(self.torch_device)
        self._streams = {lane: torch.cuda.Stream(self.torch_device) for lane in Lane}
        # One pool for every graph: they never run side by side, and what they leave in it is dead
        # by the time the next one starts, since results are written to buffers outside of it.
        self._pool = torch.cuda.graph_pool_handle()

    def free_bytes(self) -> int | None:
        """See Device: what the driver has, and what this process keeps for reuse."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        kept = torch.cuda.memory_reserved(self.torch_device)
        return free + kept - torch.cuda.memory_allocated(self.torch_device)

    def host_bytes(self, num_bytes: int) -> torch.Tensor:
        """See Device. Torch keeps released pinned memory: only the first use of a size is slow."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        """See Device."""
        return torch.cuda.stream(self._streams[lane])

    def mark(self) -> Mark:
        """See Device."""
        event = torch.cuda.Event()
        event.record()
        return event

    def record(self, run: Run) -> Run:
        """See Device: as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.torch_device)
        with self.on(Lane.COMPUTE):
            # Other threads of a server may use CUDA's host side, for instance to free pinned
            # memory. `torch.cuda.graph` would also collect garbage and give cached memory back,
            # each time: seconds, for the hundreds of graphs of a model.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # it may be broken: what broke it says more
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay
