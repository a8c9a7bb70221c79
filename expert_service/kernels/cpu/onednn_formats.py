"""How the onednn backend keeps an expert's matrices, and computes with them.

    y = W_down @ (silu(W_gate @ x) * (W_up @ x))

A chunk is C places with the rows of one or more experts, each expert's in a block of M of them.
H hidden size, I intermediate size, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from expert_service.kernels.cpu.huge_pages import use_huge_pages
from expert_service.kernels.cpu.onednn_cpu import can_int8, compute_dtype, has_packed_ops
from expertmesh.dispatch import partial_dtype
from expertmesh.model import ExpertWeights

Pause = Callable[[], None]
_P = TypeVar("_P")


class Work(NamedTuple):
    """The places `start .. stop - 1` of a chunk, and the packed expert that computes them."""

    packed: Any  # what the format's `pack` returned
    start: int
    stop: int


class Rows(NamedTuple):
    """Rows as a format multiplies them; each times its scale is what was meant."""

    values: torch.Tensor  # [rows, H]
    scale: torch.Tensor | None  # float32 [rows, 1]; None: 1


class Outputs(NamedTuple):
    """A chunk's results, to be multiplied with their row's scale."""

    values: Sequence[torch.Tensor]  # [M, H] of each block
    scale: torch.Tensor | None  # float32 [C]; None: 1


class Format(Protocol):
    """One way to keep experts."""

    name: str
    dtype: torch.dtype  # of `Rows.values`

    def pack(self, weights: ExpertWeights, pause: Pause) -> Any:
        """Nothing of `weights` is kept; `pause` is called after each matrix."""
        ...

    def width(self, packed: Any) -> int:
        """I of a packed expert."""
        ...

    def addresses(self, packed: Any) -> list[int]:
        """Where its matrices gate, up and down are; none if they are not packed by oneDNN."""
        ...

    def output_dtype(self, caller: torch.dtype) -> torch.dtype:
        """Of outputs that are to be added up and returned in the caller's dtype."""
        ...

    def encode(self, x_RH: torch.Tensor) -> Rows:
        """Rows of the caller, in any dtype. Each is treated by itself."""
        ...

    def compute(self, rows: Rows, works: Sequence[Work], dtype: torch.dtype) -> Outputs:
        """A chunk: `works` cover its places in order; `dtype` is the one of `output_dtype`."""
        ...


def create_format(dtype: torch.dtype, weights: str) -> Format:
    """The format for that dtype and treatment of weights, or the nearest that can run here."""
    dtype = compute_dtype(dtype)
    if weights == "int8" and can_int8(instead=dtype):
        return Int8Format()
    return PackedFormat(dtype) if has_packed_ops() else PlainFormat(dtype)


class _FloatFormat(ABC):
    """What formats share that keep weights, rows and outputs in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def width(self, packed: ExpertWeights) -> int:
        return int(packed.gate.shape[0])

    def addresses(self, packed: Any) -> list[int]:
        return []

    def output_dtype(self, caller: torch.dtype) -> torch.dtype:
        """A sum is rounded once: float32, unless sums are returned in this format's dtype."""
        return self.dtype if partial_dtype(caller) == self.dtype else torch.float32

    def encode(self, x_RH: torch.Tensor) -> Rows:
        return Rows(x_RH.to(self.dtype), None)

    def compute(self, rows: Rows, works: Sequence[Work], dtype: torch.dtype) -> Outputs:
        values = [
            self._swiglu(rows.values[start:stop], packed).to(dtype) for packed, start, stop in works
        ]
        return Outputs(values, None)

    @abstractmethod
    def _swiglu(self, x_MH: torch.Tensor, packed: ExpertWeights) -> torch.Tensor:
        """y of the formula above for one expert's rows, [M, H]."""


class PackedFormat(_FloatFormat):
    """oneDNN's packed matrices; the SiLU and the product are fused into the first two products."""

    def pack(self, weights: ExpertWeights, pause: Pause) -> ExpertWeights:
        return ExpertWeights(*_each(weights, self._pack, pause))

    def addresses(self, packed: ExpertWeights) -> list[int]:
        return [torch.ops.mkldnn.data_ptr(matrix) for matrix in packed]

    def _pack(self, matrix: torch.Tensor) -> torch.Tensor:
        dense = matrix.detach().to(self.dtype).contiguous()
        return _in_huge_pages(torch.ops.mkldnn._reorder_linear_weight(dense, None))

    def _swiglu(self, x_MH: torch.Tensor, packed: ExpertWeights) -> torch.Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        gate_MI = linear.default(x_MH, packed.gate, None, "swish", [], "")
        h_MI = linear.binary(x_MH, gate_MI, packed.up, None, "mul")
        y_MH: torch.Tensor = linear.default(h_MI, packed.down, None, "none", [], "")
        return y_MH


class PlainFormat(_FloatFormat):
    """Plain tensors, for a torch without packed operators."""

    def pack(self, weights: ExpertWeights, pause: Pause) -> ExpertWeights:
        return ExpertWeights(*_each(weights, self._convert, pause))

    def _convert(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.detach().to(self.dtype).contiguous()

    def _swiglu(self, x_MH: torch.Tensor, packed: ExpertWeights) -> torch.Tensor:
        linear = torch.nn.functional.linear
        h_MI = torch.nn.functional.silu(linear(x_MH, packed.gate)).mul_(linear(x_MH, packed.up))
        return linear(h_MI, packed.down)


class Int8Matrix(NamedTuple):
    """A packed matrix [N, K] of bytes: what was meant is each row times its scale."""

    values: torch.Tensor
    scale: torch.Tensor  # float32 [N]
    zero: torch.Tensor  # int64 [N], zeros: the operator asks for them


class Int8Expert(NamedTuple):
    """An expert's packed matrices."""

    gate: Int8Matrix
    up: Int8Matrix
    down: Int8Matrix


#: oneDNN's vector kernels multiply unsigned with signed bytes: rows are kept with this added.
ZERO = 128
_LARGEST = 127


class Int8Format:
    """Weights in 8 bits with a scale for each output, rows in 8 bits with a scale each (W8A8).

    Sums are exact in 32 bits, all else is float32. Rows of x, and of the intermediate, are rounded
    by themselves: what a row is merged with does not change it.
    """

    name = "int8"
    dtype = torch.uint8

    def pack(self, weights: ExpertWeights, pause: Pause) -> Int8Expert:
        return Int8Expert(*_each(weights, _pack_int8, pause))

    def addresses(self, packed: Int8Expert) -> list[int]:
        return [torch.ops.mkldnn.data_ptr(matrix.values) for matrix in packed]

    def width(self, packed: Int8Expert) -> int:
        return len(packed.gate.scale)

    def output_dtype(self, caller: torch.dtype) -> torch.dtype:
        """Outputs are not scaled yet: float32, or the range of it."""
        return torch.bfloat16 if caller == torch.bfloat16 else torch.float32

    def encode(self, x_RH: torch.Tensor) -> Rows:
        return _round_rows(x_RH.float(), in_place=False)

    def compute(self, rows: Rows, works: Sequence[Work], dtype: torch.dtype) -> Outputs:
        # Element by element for many experts at once: for few rows a call costs more than its work.
        # A shared expert may be wider than the routed ones.
        runs = [
            self._compute(rows, list(run), dtype)
            for _, run in groupby(works, key=lambda work: self.width(work.packed))
        ]
        values = [block for blocks, _ in runs for block in blocks]
        return Outputs(values, _join([scale for _, scale in runs]))

    def _compute(
        self, rows: Rows, works: Sequence[Work], dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Neighbouring works, of experts of one width: blocks of values, and the places' scale."""
        x_CH, scale_C1 = rows
        assert scale_C1 is not None
        first, last = works[0].start, works[-1].stop
        scale_C1 = scale_C1[first:last]
        gate_CI = _join([_multiply(x_CH[i:j], expert.gate) for expert, i, j in works])
        up_CI = _join([_multiply(x_CH[i:j], expert.up) for expert, i, j in works])
        h_CI = torch.nn.functional.silu(gate_CI.mul_(scale_C1), inplace=True).mul_(up_CI)
        h_CI, h_scale_C1 = _round_rows(h_CI, in_place=True)
        assert h_scale_C1 is not None
        values = [
            _multiply(h_CI[i - first : j - first], expert.down, dtype) for expert, i, j in works
        ]
        return values, h_scale_C1.mul_(scale_C1).reshape(-1)  # `up` was not scaled yet


def _each(weights: ExpertWeights, pack: Callable[[torch.Tensor], _P], pause: Pause) -> list[_P]:
    """Every matrix packed, with a pause after each."""
    packed = []
    for matrix in weights:
        packed.append(pack(matrix))
        pause()
    return packed


def _multiply(
    x_MK: torch.Tensor, matrix: Int8Matrix, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows times a matrix, [M, N] of `dtype`; the rows' own scales are left to the caller."""
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        *(x_MK, 1.0, ZERO),
        *matrix,
        *(None, 1.0, 0, dtype),
        *("none", [], ""),
    )
    return product


def _join(blocks: list[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _round_rows(x_RH: torch.Tensor, *, in_place: bool) -> Rows:
    """float32 rows in 8 bits, with a scale for each. A row that is not finite gets such a scale."""
    largest_R1 = torch.linalg.vector_norm(x_RH, ord=torch.inf, dim=1, keepdim=True)
    factor_R1 = _LARGEST / largest_R1.clamp(min=torch.finfo(torch.float32).tiny)
    shifted_RH = x_RH.mul_(factor_R1) if in_place else x_RH * factor_R1
    return Rows(shifted_RH.add_(ZERO + 0.5).to(torch.uint8), largest_R1.div_(_LARGEST))


def round_matrix(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [N, K] in int8, and the scales of its rows, float32 [N]."""
    dense = matrix.detach().float()
    scale_N1 = dense.abs().amax(dim=1, keepdim=True) / _LARGEST
    # A row of zeros stays one, whatever it is divided by.
    rounded = (dense / scale_N1.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    return rounded.to(torch.int8), scale_N1.reshape(-1)


def _pack_int8(matrix: torch.Tensor) -> Int8Matrix:
    rounded, scale_N = round_matrix(matrix)
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    return Int8Matrix(
        _in_huge_pages(packed), scale_N, torch.zeros(len(scale_N), dtype=torch.int64, device="cpu")
    )


def _in_huge_pages(packed: torch.Tensor) -> torch.Tensor:
    use_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
    return packed
