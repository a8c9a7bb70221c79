"""Random experts and batches for kernel benchmarks, and what the experts give: slow and in float32.

T tokens, K experts asked per token, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from kernel_cases import Shard

from expert_service.kernels.triton.matrices import FP8, SCALE_BLOCK, ExpertMatrices

_LARGEST = 448.0  # of float8 e4m3


class Inputs(NamedTuple):
    """One batch."""

    hidden: torch.Tensor  # [T, H]
    ids: torch.Tensor  # int32 [T, K], different ones in a row
    weights: torch.Tensor  # float32 [T, K], adding up to 1


def make_matrices(shard: Shard, dtype: torch.dtype, device: str) -> ExpertMatrices:
    """Weights that keep the size of what passes through them."""
    generator = torch.Generator(device).manual_seed(0)

    def matrices(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(shard.experts, rows, columns, dtype=dtype, device=device)
        for matrix in made:
            matrix.normal_(std=columns**-0.5, generator=generator)
        return made

    sizes = (shard.intermediate, shard.hidden)
    return ExpertMatrices(matrices(*sizes), matrices(*sizes), matrices(*sizes[::-1]))


def to_fp8(matrices: ExpertMatrices) -> ExpertMatrices:
    """The same in FP8, with one scale for each block of 128 x 128."""
    pairs = [_quantize(matrix) for matrix in matrices[:3]]
    return ExpertMatrices(*(weight for weight, _ in pairs), *(scale for _, scale in pairs))


def make_inputs(
    shard: Shard, tokens: int, sets: int, dtype: torch.dtype, device: str
) -> list[Inputs]:
    """Batches with routings of their own: few tokens meet other experts in each."""
    generator = torch.Generator(device).manual_seed(tokens)
    made = []
    for _ in range(sets):
        hidden = torch.randn(tokens, shard.hidden, generator=generator, device=device).to(dtype)
        order = torch.rand(tokens, shard.experts, generator=generator, device=device).argsort(1)
        ids = order[:, : shard.top_k].to(torch.int32).contiguous()
        raw = torch.rand(tokens, shard.top_k, generator=generator, device=device) + 0.1
        made.append(Inputs(hidden, ids, raw / raw.sum(1, keepdim=True)))
    return made


def reference(inputs: Inputs, matrices: ExpertMatrices) -> torch.Tensor:
    """[T, H] in the dtype of the hidden states, rounded once."""
    hidden = inputs.hidden.float()
    out = torch.zeros_like(hidden)
    for expert in range(len(matrices.gate_LIH)):
        rows, columns = (inputs.ids == expert).nonzero(as_tuple=True)
        gate, up, down = (_float(matrices, index, expert) for index in range(3))
        x = hidden[rows]
        y = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        out.index_add_(0, rows, y * inputs.weights[rows, columns, None])
    return out.to(inputs.hidden.dtype)


def _float(matrices: ExpertMatrices, index: int, expert: int) -> torch.Tensor:
    matrix = matrices[index]
    scales = matrices[index + 3]
    assert matrix is not None
    if scales is None:
        return matrix[expert].float()
    return matrix[expert].float() * _spread(scales[expert], tuple(matrix.shape[1:]))


def _spread(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """One scale for each element."""
    for dim in (0, 1):
        scales = scales.repeat_interleave(SCALE_BLOCK, dim)
    return scales[: shape[0], : shape[1]]


def _quantize(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantized, scales = torch.empty_like(matrices, dtype=FP8), []
    for matrix, target in zip(matrices, quantized, strict=True):
        rows, columns = matrix.shape
        padding = (0, -columns % SCALE_BLOCK, 0, -rows % SCALE_BLOCK)
        blocks = torch.nn.functional.pad(matrix.float().abs(), padding)
        tiled = blocks.unflatten(0, (-1, SCALE_BLOCK)).unflatten(2, (-1, SCALE_BLOCK))
        scale = tiled.amax((1, 3)).clamp(min=1e-12) / _LARGEST
        target.copy_((matrix.float() / _spread(scale, (rows, columns))).to(FP8))
        scales.append(scale)
    return quantized, torch.stack(scales)
