"""How both products load tiles of weights and multiply by them.

A program multiplies rows x by weights, x @ weights^T, or computes the transpose of that, where the
tile says so: tensor cores of sm_90 take the first operand from registers, where FP8 weights have
been widened, and 64 of its rows at a time, which weights have and few rows of x have not. Weights
come by pointers, or by the copy engine (TMA) through a descriptor, whatever the tile says.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_TMA_ALIGN = 16  # bytes of an address, and of every stride but the last


@triton.jit
def weights_at(weights, slot, stride_slot, stride_row, rows, offs_k, TMA: tl.constexpr):
    """Pointers to a tile [BLOCK_N, BLOCK_K] at k = 0, or the descriptor itself."""
    if TMA:
        found = weights
    else:
        found = weights + slot * stride_slot + rows[:, None] * stride_row + offs_k[None, :]
    return found


@triton.jit
def load_weights(
    weights, slot, row, k, inner, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """The tile [BLOCK_N, BLOCK_K] at k; `inner` are the columns that there are, None for all."""
    if TMA:
        tile = weights.load([slot, row, k]).reshape([BLOCK_N, BLOCK_K])
    elif inner is None:
        tile = tl.load(weights + k)
    else:
        tile = tl.load(weights + k, mask=inner[None, :], other=0.0)
    return tile


@triton.jit
def no_sum(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What a product is added to first."""
    if TRANSPOSED:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return total


@triton.jit
def add_product(total, x, weights, TRANSPOSED: tl.constexpr):
    """total + x @ weights^T, all of it transposed where TRANSPOSED."""
    if TRANSPOSED:
        total = tl.dot(weights, tl.trans(x), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(weights), total, input_precision="ieee")
    return total


@triton.jit
def by_row(values, TRANSPOSED: tl.constexpr):
    """One value for each row of x, as it is multiplied with a product."""
    return values[None, :] if TRANSPOSED else values[:, None]


def takes_descriptor(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read a tensor: it asks for alignment."""
    if not tensor.numel() or tensor.data_ptr() % _TMA_ALIGN or tensor.stride(-1) != 1:
        return False
    return all(stride * tensor.itemsize % _TMA_ALIGN == 0 for stride in tensor.stride()[:-1])


def described(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    """A tensor as the copy engine reads it, in blocks of that shape."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
