"""Tensors that tests of the codec send, and what generated code makes of them."""

from __future__ import annotations

import numpy as np
import torch

from expertmesh.codec import tensors
from expertmesh.codec.tensors import Array
from expertmesh.v1 import tensor_pb2

LIMIT = 64 << 20
BIG_ID = (1 << 64) - 1


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random elements, the same for the same shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 4).to(dtype)


def same(got: torch.Tensor | Array | None, wanted: torch.Tensor | Array | None) -> bool:
    """Equal in dtype, shape and every bit."""
    if got is None or wanted is None:
        return got is wanted
    if isinstance(got, np.ndarray) and isinstance(wanted, np.ndarray):
        return same(torch.from_numpy(got), torch.from_numpy(wanted))
    return (
        got.dtype == wanted.dtype
        and got.shape == wanted.shape
        and bytes(tensors.payload(got)) == bytes(tensors.payload(wanted))
    )


def as_proto(tensor: torch.Tensor, length: int | None = None) -> tensor_pb2.Tensor:
    """The generated message of a tensor, or of its first `length` bytes."""
    data = bytes(tensors.payload(tensor))
    return tensor_pb2.Tensor(
        data_type=tensors.NUMBER_BY_DTYPE[tensor.dtype],  # type: ignore[arg-type]
        shape=list(tensor.shape),
        data=data if length is None else data[:length],
    )


IDS = torch.tensor([[0, 5], [300, -1], [2, 7]], dtype=torch.int32)
WEIGHTS = drawn(3, 2)
