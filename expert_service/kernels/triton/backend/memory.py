"""What a shard needs of a GPU's memory: the arithmetic behind "does not fit". Pure.

H hidden size, I intermediate size, R rows of the largest piece of a batch, K pairs asked per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch

from expert_service.kernels.triton.matrices import FP8, scale_shape
from expertmesh.errors import ConfigError

_SCALE_BYTES = 4
_BLOCK_M = 128  # the largest: each expert's last block of sorted positions may be almost empty
_LANES = 2  # of inputs and outputs: one is copied while the other is computed
#: CUDA graphs, compiled kernels and what the allocator rounds up.
_BASE_BYTES = 256 << 20


class Format(NamedTuple):
    """What experts must share to lie in one stack of matrices."""

    layer: int
    width: int
    fp8: bool  # e4m3 with scales of 128 x 128 blocks, else the dtype that the backend computes in

    def weight_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the matrices; `dtype` is what the backend computes in."""
        return FP8 if self.fp8 else dtype

    def slot_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """One expert's weights and scales."""
        weights = 3 * hidden_size * self.width * self.weight_dtype(dtype).itemsize
        blocks, across = scale_shape(self.width, hidden_size)
        return weights + (3 * blocks * across * _SCALE_BYTES if self.fp8 else 0)


def workspace_bytes(
    formats: Iterable[Format], experts: int, rows: int, k: int, hidden_size: int, item_bytes: int
) -> int:
    """What computing `rows` rows takes beside the weights, at most."""
    positions = rows * k + experts * _BLOCK_M
    widest = max((each.width for each in formats), default=0)
    between = positions * (hidden_size + widest) * item_bytes
    staged = _LANES * 2 * rows * hidden_size * item_bytes
    return between + staged + _BASE_BYTES


def does_not_fit(
    counts: Counter[Format],
    hidden_size: int,
    dtype: torch.dtype,
    workspace: int,
    free: int,
    device: str,
) -> ConfigError:
    """The error that says how many experts of how many bytes do not fit, and what to do."""
    sizes: Counter[tuple[int, str]] = Counter()
    for each, count in counts.items():
        name = str(each.weight_dtype(dtype)).removeprefix("torch.")
        sizes[each.slot_bytes(hidden_size, dtype), name] += count
    parts = " + ".join(
        f"{count} experts x {_human(size)} of {name}"
        for (size, name), count in sorted(sizes.items())
    )
    weights = sum(size * count for (size, _), count in sizes.items())
    return ConfigError(
        f"{parts} = {_human(weights)} of weights and {_human(workspace)} to compute in need "
        f"{_human(weights + workspace)}, but {device} has {_human(free)} free: use more shards, "
        "fewer servers on this GPU, or a smaller dtype"
    )


def _human(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 2**10:.2f} KiB"
