"""What a device must be able to do: hold slots and add up their weighted outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from expertmesh.model import ExpertWeights, Fp8ExpertWeights, Slot


class Backend(Protocol):
    """Holds experts on one device and computes with them.

    Called from one thread at a time, but for `prepare`.
    """

    @property
    def name(self) -> str:
        """Backend and device, for example "onednn/cpu"."""
        ...

    @property
    def takes_fp8(self) -> bool:
        """Whether `load` takes FP8 weights with their scales, and keeps them so."""
        ...

    @property
    def any_thread(self) -> bool:
        """Whether calls may come from several threads, one at a time."""
        ...

    def host_footprint(self, weights: int, dtype: torch.dtype) -> int:
        """Bytes of the host's memory that an expert of so many weights, given in `dtype`, takes.

        0 where it is held on a device with memory of its own.
        """
        ...

    def prepare(self, weights: ExpertWeights | Fp8ExpertWeights, pause: Callable[[], None]) -> Any:
        """What `load` takes over without further work, where the backend can make such;
        else the weights.

        From any thread, also while others compute; `pause` is called between pieces of the work.
        What it returns is of use to `load` alone.
        """
        ...

    def load(self, slot: Slot, weights: Any) -> None:
        """Takes one expert's weights, in the dtype they shall compute in, or FP8, or prepared.

        The backend may keep the tensors or a packed copy; the caller drops its references.
        Raises ConfigError when they do not fit the device's memory.
        """
        ...

    def drop(self, slot: Slot) -> object:
        """Forgets one expert. Raises KeyError when it is not held.

        Returns what it held, if that is memory of the host: to free it takes milliseconds, which
        the caller may spend on another thread.
        """
        ...

    def finish_loading(self) -> None:
        """Called once after the initial loads: warm up what the first request would pay for."""
        ...

    def compute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """For each row, the sum over k of weights[r, k] * expert(ids[r, k])(hidden[r]).

        `hidden_RH` is float32, float16 or bfloat16 on the CPU; `expert_ids_RK` int32, -1 where
        nothing is asked; `weights_RK` float32. Sums are accumulated in float32 and returned as
        [R, H] in `dispatch.partial_dtype` of `hidden_RH`'s dtype, on the CPU. R may be 0. A row
        whose ids are all -1 gives zeros. Every id other than -1 is held, and none is twice in a
        row: the caller has checked.
        """
        ...
