"""Inputs that the tests of the Triton kernels share, and the device they run on.

Under Triton's interpreter, bfloat16 arithmetic is silently wrong: it counts on a GPU only.
"""

from __future__ import annotations

import torch

from expert_service.kernels.triton.experts import grouped_swiglu_experts
from expert_service.kernels.triton.matrices import FP8, ExpertMatrices, scale_shape
from expert_service.kernels.triton.products.route import Route
from expert_service.kernels.triton.tables.tiles import Tiles

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
EXPERTS = 6


def experts_of(
    dtype: torch.dtype, hidden: int = 48, width: int = 20, slots: int = EXPERTS
) -> ExpertMatrices:
    """Weights of any dtype; FP8 ones with scales that differ between blocks."""
    generator = torch.Generator().manual_seed(0)

    def matrices(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(slots, rows, columns, generator=generator) / columns**0.5

    def scales(rows: int, columns: int) -> torch.Tensor:
        shape = scale_shape(rows, columns)
        return torch.rand(slots, *shape, generator=generator) / 50 + 0.01

    sizes = ((width, hidden), (width, hidden), (hidden, width))
    if dtype != FP8:
        return ExpertMatrices(*(matrices(*size).to(dtype) for size in sizes))
    weights = ((matrices(*size) * 50).to(FP8) for size in sizes)
    return ExpertMatrices(*weights, *(scales(*size) for size in sizes))


def rows_of(rows: int, dtype: torch.dtype, hidden: int = 48) -> torch.Tensor:
    """Activations."""
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)


def routing_of(
    rows: int, k: int, experts: int = EXPERTS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """k different ids for each row, and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator).argsort(dim=1)[:, :k]
    return ids.to(torch.int32).contiguous(), torch.rand(rows, k, generator=generator)


def on_device(experts: ExpertMatrices) -> ExpertMatrices:
    """The same weights, where the kernels run."""
    return ExpertMatrices(*(None if each is None else each.to(DEVICE) for each in experts))


def on_cpu(routed: Route) -> Route:
    """The same route, where the reference runs."""
    return Route(*(tensor.cpu() for tensor in routed[:5]), *routed[5:])


def run(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertMatrices,
    local_slots: torch.Tensor | None = None,
    block_m: int | None = None,
    tiles: Tiles | None = None,
    w8a8: bool = False,
) -> torch.Tensor:
    """The grouped experts on the device, of inputs and to an output on the CPU."""
    inputs = (tensor.to(DEVICE) for tensor in (hidden, ids, weights))
    slots = None if local_slots is None else local_slots.to(DEVICE)
    return grouped_swiglu_experts(*inputs, on_device(experts), slots, block_m, tiles, w8a8).cpu()
