"""SwiGLU experts on the CPU with oneDNN's packed matrices.

    y[p] = W_down @ (silu(W_gate @ x[p]) * (W_up @ x[p]))
    out[r] = sum of weight[p] * y[p] over the pairs p of row r

Pairs (row, expert) are sorted by expert; each hit expert runs three packed matrix products on its
rows, with the SiLU and the product fused into the first two. R rows, K pairs asked per row, P
pairs kept, H hidden size, I intermediate size, M rows of one block.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable

import torch

from expert_service.kernels.grouping import Grouping, group_by_expert, sum_by_row
from expertmesh.model import ExpertWeights, Fp8ExpertWeights, ModelSpec, Slot

_LOG = logging.getLogger(__name__)

#: Numbers of rows that matrix products run on; others are padded to the next one.
#:
#: oneDNN builds a primitive for each number of rows, in 0.5 to 1 ms and 0.6 MB each (measured,
#: bf16 on AVX-512), and keeps 1024 of them: exact row counts would cost 600 MB and never settle.
#: This costs 2 MB for each size in use and each shape of expert, and 2 % more rows on average
#: where products are limited by arithmetic; 2 rows more are free where they are by weight reads.
_BLOCK_SIZES: tuple[int, ...] = (
    *(1, 2),
    *range(4, 32, 2),
    *range(32, 64, 4),
    *range(64, 128, 8),
    *range(128, 512, 16),
    *range(512, 1025, 32),
)
#: More rows are computed in several blocks: bounds the intermediates, and costs no speed.
_MAX_BLOCK = _BLOCK_SIZES[-1]
#: Sizes warmed up: decoding uses them, and above the first call's cost is small beside the work.
_WARM_SIZES = tuple(size for size in _BLOCK_SIZES if size <= 16)
#: What a size costs in memory for each shape of expert: three primitives of 0.62 MB (measured).
_WARM_BYTES = 3 * 620_000
#: Small shards are warmed for fewer sizes: memory in proportion to the shard matters more there.
_WARM_SHARE = 0.1

_Swiglu = Callable[[torch.Tensor, ExpertWeights], torch.Tensor]


def block_rows(rows: int, smallest: int = 1) -> int:
    """The size of the block in which `rows` rows, at most `_MAX_BLOCK`, are computed."""
    return _BLOCK_SIZES[bisect_left(_BLOCK_SIZES, max(rows, smallest))]


def _swiglu_packed(x_MH: torch.Tensor, packed: ExpertWeights) -> torch.Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    gate_MI = linear.default(x_MH, packed.gate, None, "swish", [], "")
    h_MI = linear.binary(x_MH, gate_MI, packed.up, None, "mul")
    y_MH: torch.Tensor = linear.default(h_MI, packed.down, None, "none", [], "")
    return y_MH


def _swiglu_plain(x_MH: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    linear = torch.nn.functional.linear
    h_MI = torch.nn.functional.silu(linear(x_MH, weights.gate)).mul_(linear(x_MH, weights.up))
    return linear(h_MI, weights.down)


def has_packed_ops() -> bool:
    """Whether this build of torch has oneDNN's packed linear operators."""
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )


def compute_dtype(wanted: torch.dtype) -> torch.dtype:
    """`wanted`, or float32 where this CPU has no instructions for it."""
    if wanted == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return wanted
    if wanted == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return wanted
    return torch.float32


class OneDnnBackend:
    """Implements `Backend` on the CPU. Not thread-safe; buffers are reused between calls."""

    name = "onednn/cpu"
    takes_fp8 = False
    any_thread = True

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, threads: int) -> None:
        """Computes in `dtype` where the CPU can, else in float32, with `threads` threads."""
        self._threads = threads
        self._packed = has_packed_ops()
        self._dtype = compute_dtype(dtype) if self._packed else dtype
        self._swiglu: _Swiglu = _swiglu_packed if self._packed else _swiglu_plain
        self._experts: dict[int, dict[int, ExpertWeights]] = {}
        self._bytes = 0  # of everything loaded, before packing
        self._x = _RowBuffer(spec.hidden_size)
        self._y = _RowBuffer(spec.hidden_size)
        # Without AMX, oneDNN's kernels for 1 and 2 rows read weights 10 to 25 % slower than
        # the one for 4 rows (measured on AVX-512 bf16, H 2048, I 1408).
        self._smallest = 1 if torch.cpu._is_amx_tile_supported() else 4
        if not self._packed:
            _LOG.warning("this torch lacks oneDNN's packed linear operators: using plain ones")
        if self._dtype != dtype:
            _LOG.warning("this CPU cannot compute in %s: using %s", dtype, self._dtype)

    def prepare(
        self, weights: ExpertWeights | Fp8ExpertWeights, pause: Callable[[], None] = lambda: None
    ) -> ExpertWeights:
        """Packs one expert's matrices; nothing of `weights` is kept. See Backend."""
        assert isinstance(weights, ExpertWeights)  # as `takes_fp8` says
        matrices = []
        for matrix in weights:
            matrix = matrix.detach().to(self._dtype).contiguous()
            if self._packed:
                matrix = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
            matrices.append(matrix)
            pause()
        return ExpertWeights(*matrices)

    def load(self, slot: Slot, weights: ExpertWeights | Fp8ExpertWeights) -> None:
        """Keeps packed matrices, and packs others; nothing of those is kept."""
        assert isinstance(weights, ExpertWeights)  # as `takes_fp8` says
        packed = weights if weights.gate.is_mkldnn else self.prepare(weights)
        self._experts.setdefault(slot.layer, {})[slot.expert] = packed
        self._bytes += sum(matrix.numel() * self._dtype.itemsize for matrix in packed)

    def drop(self, slot: Slot) -> ExpertWeights:
        """Forgets one expert, and returns it. Raises KeyError when it is not held."""
        return self._experts[slot.layer].pop(slot.expert)

    @torch.no_grad()
    def finish_loading(self) -> None:
        """Builds the primitives of small blocks, once for each shape of expert."""
        self._use_threads()
        shapes = {
            packed.gate.shape: packed
            for experts in self._experts.values()
            for packed in experts.values()
        }
        sizes = [size for size in _WARM_SIZES if size >= self._smallest]
        affordable = _WARM_SHARE * self._bytes / (_WARM_BYTES * max(1, len(shapes)))
        for packed in shapes.values():
            for size in sizes[: int(affordable)]:
                self._swiglu(self._x.take(size, self._dtype), packed)

    @torch.no_grad()
    def compute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """See `Backend.compute`."""
        self._use_threads()
        experts = self._experts.get(layer, {})
        x_RH = hidden_RH.to(self._dtype)
        # A sum is rounded once: to the caller's dtype, so float32 until then where y has another.
        sum_dtype = self._dtype if hidden_RH.dtype == self._dtype else torch.float32
        if len(x_RH) == 1:
            out_RH = self._compute_row(experts, x_RH, expert_ids_RK, weights_RK, sum_dtype)
            return out_RH.to(hidden_RH.dtype)
        grouping = group_by_expert(expert_ids_RK, weights_RK)
        if grouping.is_identity(len(x_RH)):
            return self._compute_all(experts[grouping.groups[0].expert], x_RH, hidden_RH.dtype)
        y_PH = self._compute_pairs(experts, x_RH, grouping, sum_dtype)
        out_RH = sum_by_row(y_PH, grouping.weights, grouping.positions, grouping.offsets)
        return out_RH.to(hidden_RH.dtype)

    def _compute_row(
        self,
        experts: dict[int, ExpertWeights],
        x_1H: torch.Tensor,
        expert_ids_1K: torch.Tensor,
        weights_1K: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """A single row: nothing to sort or gather. Returns [1, H] of `dtype`.

        Summed as in a batch, so that a row's bits do not depend on what it was merged with.
        """
        pairs = zip(expert_ids_1K[0].tolist(), weights_1K[0].tolist(), strict=True)
        kept = [(expert, weight) for expert, weight in pairs if expert >= 0]
        x_MH = self._pad(x_1H)
        y_PH = self._y.take(len(kept), dtype)
        for index, (expert, _) in enumerate(kept):
            y_PH[index].copy_(self._swiglu(x_MH, experts[expert])[0])
        weights_P = torch.tensor([weight for _, weight in kept], dtype=torch.float32)
        start = torch.zeros(1, dtype=torch.int64)
        return sum_by_row(y_PH, weights_P, torch.arange(len(kept)), start)

    def _compute_all(
        self, packed: ExpertWeights, x_RH: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """One expert on every row with weight 1 (shared, dense): nothing to sort or add up."""
        out_RH = torch.empty(x_RH.shape, dtype=dtype)
        for x_MH, out_MH in zip(x_RH.split(_MAX_BLOCK), out_RH.split(_MAX_BLOCK), strict=True):
            out_MH.copy_(self._swiglu(self._pad(x_MH), packed)[: len(x_MH)])
        return out_RH

    def _compute_pairs(
        self,
        experts: dict[int, ExpertWeights],
        x_RH: torch.Tensor,
        grouping: Grouping,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Every kept pair's expert output, unweighted, sorted by expert: [P, H] of `dtype`."""
        y_PH = self._y.take(len(grouping.rows), dtype)
        for expert, first, last in grouping.groups:
            packed = experts[expert]
            for start in range(first, last, _MAX_BLOCK):
                stop = min(start + _MAX_BLOCK, last)
                x_MH = self._gather(x_RH, grouping.rows[start:stop])
                y_PH[start:stop].copy_(self._swiglu(x_MH, packed)[: stop - start])
        return y_PH

    def _gather(self, x_RH: torch.Tensor, rows_M: torch.Tensor) -> torch.Tensor:
        """The rows in a reused buffer, padded with rows of whatever was there before.

        A row's result does not depend on the other rows, so the padding is computed and ignored.
        """
        rows = len(rows_M)
        x_MH = self._x.take(block_rows(rows, self._smallest), self._dtype)
        torch.index_select(x_RH, 0, rows_M, out=x_MH[:rows])
        return x_MH

    def _pad(self, x_RH: torch.Tensor) -> torch.Tensor:
        rows = block_rows(len(x_RH), self._smallest)
        if rows == len(x_RH):
            return x_RH
        x_MH = self._x.take(rows, self._dtype)
        x_MH[: len(x_RH)].copy_(x_RH)
        return x_MH

    def _use_threads(self) -> None:
        # A setting of the calling thread, and part of the key of oneDNN's primitives.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)


class _RowBuffer:
    """Rows that are reused between calls: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._bytes = torch.zeros(0, dtype=torch.uint8)

    def take(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] of `dtype`, with any content; valid until the next `take`."""
        needed = rows * self._width * dtype.itemsize
        if needed > len(self._bytes):
            self._bytes = torch.zeros(needed, dtype=torch.uint8)
        return self._bytes[:needed].view(dtype).view(rows, self._width)
