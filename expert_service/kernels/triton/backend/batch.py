"""One batch in one run of bytes, laid out alike on the host and on the device: one copy moves it.

    ids int32 [R, K] | weights float32 [R, K] | hidden [R, H]

R rows, K pairs asked per row, H hidden size. Hidden states come last, so that a batch that is
padded to R rows is moved without the hidden states of its padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_ALIGN = 256  # of each part: what a GPU's own allocations have, so that kernels load alike


class Batch(NamedTuple):
    """Views into a run of bytes."""

    ids_RK: torch.Tensor
    weights_RK: torch.Tensor
    hidden_RH: torch.Tensor


def batch_bytes(
    rows: int, k: int, hidden_size: int, dtype: torch.dtype, filled: int | None = None
) -> int:
    """How many bytes a batch takes; up to the end of its first `filled` rows, if given."""
    hidden_rows = rows if filled is None else filled
    return 2 * _pairs_bytes(rows, k) + hidden_rows * hidden_size * dtype.itemsize


def batch_views(
    buffer: torch.Tensor, rows: int, k: int, hidden_size: int, dtype: torch.dtype
) -> Batch:
    """The parts of a batch at the start of `buffer`, uint8 [at least `batch_bytes`]."""
    pairs = _pairs_bytes(rows, k)
    used = rows * k * 4
    hidden = buffer[2 * pairs : batch_bytes(rows, k, hidden_size, dtype)]
    return Batch(
        buffer[:used].view(torch.int32).view(rows, k),
        buffer[pairs : pairs + used].view(torch.float32).view(rows, k),
        hidden.view(dtype).view(rows, hidden_size),
    )


def fill(
    batch: Batch, hidden_RH: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor
) -> None:
    """Copies a batch in, converted to its dtype, and pads it with ids -1 down and across.

    Hidden states and weights of padding stay what they were: nothing reads them.
    """
    rows, k = ids_RK.shape
    batch.ids_RK[:rows, :k] = ids_RK
    batch.ids_RK[:rows, k:] = -1
    batch.ids_RK[rows:] = -1
    batch.weights_RK[:rows, :k] = weights_RK
    batch.hidden_RH[:rows] = hidden_RH


def _pairs_bytes(rows: int, k: int) -> int:
    return -(-rows * k * 4 // _ALIGN) * _ALIGN
