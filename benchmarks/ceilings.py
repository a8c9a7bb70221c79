"""What this machine can do at most, as far as torch shows it: reading memory, multiplying bf16."""

from __future__ import annotations

import functools

import torch

from expert_service.kernels.cpu.huge_pages import use_huge_pages

READ_BYTES = 512 << 20  # many times any cache
_SIZE = 2048
GEMM_FLOP = 2 * _SIZE**3


def read(_round: int = 0) -> object:
    """Reads READ_BYTES once with all threads; the fastest of torch's reductions here."""
    return _memory().amax()


def gemm(_round: int = 0) -> object:
    """One square bf16 product of GEMM_FLOP operations, weights packed beforehand."""
    x, packed = _matrices()
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@functools.cache
def _memory() -> torch.Tensor:
    memory = torch.empty(READ_BYTES // 4)
    use_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory.fill_(1.0)


@functools.cache
def _matrices() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(_SIZE, _SIZE, generator=generator).bfloat16() for _ in range(2))
    return x, torch.ops.mkldnn._reorder_linear_weight(weight, None)
