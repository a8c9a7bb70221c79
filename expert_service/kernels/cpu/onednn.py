"""SwiGLU experts on the CPU with oneDNN's packed matrices.

    y[p] = W_down @ (silu(W_gate @ x[p]) * (W_up @ x[p]))
    out[r] = sum of weight[p] * y[p] over the pairs p of row r

Pairs (row, expert) are sorted by expert; each hit expert runs three packed matrix products on its
rows, with the SiLU and the product fused into the first two. R rows, K pairs asked per row, S
places of the sorted pairs (`grouping`), H hidden size, C places of one chunk.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from expert_service.kernels.cpu.avx512_experts import InBlocks, create_avx512_experts
from expert_service.kernels.cpu.crew import Crew, divide
from expert_service.kernels.cpu.grouping import (
    BlockSizes,
    Grouping,
    chunks,
    group_by_expert,
    sum_by_row,
)
from expert_service.kernels.cpu.onednn_cpu import fall_back, has_tiles
from expert_service.kernels.cpu.onednn_formats import Rows, Work, create_format
from expertmesh.dispatch import partial_dtype
from expertmesh.model import ExpertWeights, Fp8ExpertWeights, ModelSpec, Slot

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
#: Experts are computed beside each other where they bring so many bytes of weights in all: with
#: less, waking threads takes longer than what it saves.
_CREW_BYTES = 4 << 20


def block_rows(rows: int, smallest: int = 1) -> int:
    """The size of the block in which `rows` rows, at most `_MAX_BLOCK`, are computed."""
    return _BLOCK_SIZES[bisect_left(_BLOCK_SIZES, max(rows, smallest))]


class Prepared(NamedTuple):
    """One expert, packed by `OneDnnBackend.prepare` for its `load`."""

    packed: Any  # what the format's `pack` returned; None if oneDNN is not to compute it
    blocks: InBlocks | None  # for our own kernels
    size: int  # bytes before packing


class OneDnnBackend:
    """Implements `Backend` on the CPU. Not thread-safe; buffers are reused between calls."""

    takes_fp8 = False
    any_thread = True

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, threads: int, weights: str = "auto"
    ) -> None:
        """Computes in `dtype`, or with int8 weights if `weights` is "int8", with `threads` threads.

        What this CPU or torch cannot do is replaced, with a `FallbackWarning`.
        """
        self._threads = threads
        self._crew = Crew(threads)
        self._format = create_format(dtype, weights)
        self.name = "onednn/cpu" if self._format.name != "int8" else "onednn-int8/cpu"
        self._experts: dict[int, dict[int, Any]] = {}
        self._blocks: dict[int, dict[int, InBlocks]] = {}
        self._bytes = self._loads = 0  # of everything loaded, before packing; how many experts
        self._own = create_avx512_experts(self._format.name, spec, self._crew)
        self._x = _RowBuffer(spec.hidden_size)
        self._y = _RowBuffer(spec.hidden_size)
        # Without AMX, oneDNN's kernels for 1 and 2 rows read weights 10 to 25 % slower than
        # the one for 4 rows (measured on AVX-512 bf16, H 2048, I 1408).
        smallest = 1 if has_tiles() else 4
        self._warm_sizes = [size for size in _WARM_SIZES if size >= smallest]
        self._sizes = BlockSizes(lambda rows: block_rows(rows, smallest), _MAX_BLOCK)

    def host_footprint(self, weights: int, dtype: torch.dtype) -> int:
        """See Backend: by what is computed in, whatever the weights come in."""
        return weights * self._format.dtype.itemsize

    def prepare(
        self, weights: ExpertWeights | Fp8ExpertWeights, pause: Callable[[], None] = lambda: None
    ) -> Prepared:
        """Packs one expert's matrices; nothing of `weights` is kept. See Backend."""
        assert isinstance(weights, ExpertWeights)  # as `takes_fp8` says
        size = sum(matrix.nbytes for matrix in weights)
        own = self._own
        if own is not None and own.takes_all:
            return Prepared(None, own.pack(weights, pause), size)
        packed = self._format.pack(weights, pause)
        if own is None:
            return Prepared(packed, None, size)
        return Prepared(packed, own.adopt(weights, self._format.addresses(packed), packed), size)

    def load(self, slot: Slot, weights: ExpertWeights | Fp8ExpertWeights | Prepared) -> None:
        """Keeps what is prepared, and prepares the rest; nothing of the weights is kept."""
        self._use_threads()
        prepared = weights if isinstance(weights, Prepared) else self.prepare(weights)
        self._experts.setdefault(slot.layer, {})[slot.expert] = prepared.packed
        if prepared.blocks is not None:
            self._blocks.setdefault(slot.layer, {})[slot.expert] = prepared.blocks
        elif self._own is not None:
            fall_back("oneDNN packs in another layout: products are its own, slower for few rows")
            self._own = None
        self._bytes += prepared.size
        self._loads += 1

    def drop(self, slot: Slot) -> object:
        """Forgets one expert, and returns it. Raises KeyError when it is not held."""
        packed = self._experts[slot.layer].pop(slot.expert)
        return packed, self._blocks.get(slot.layer, {}).pop(slot.expert, None)

    @torch.no_grad()
    def finish_loading(self) -> None:
        """Builds oneDNN's primitives of small blocks, once for each shape of expert."""
        if self._own is not None and self._own.takes_all:
            return
        self._use_threads()
        shapes = {
            self._format.width(packed): packed
            for experts in self._experts.values()
            for packed in experts.values()
        }
        # A primitive is for a number of threads: all of them, and one, when experts run beside.
        ways = 1 if self._threads == 1 else 2
        affordable = _WARM_SHARE * self._bytes / (ways * _WARM_BYTES * max(1, len(shapes)))
        for packed in shapes.values():
            for size in self._warm_sizes[: int(affordable)]:
                rows = self._format.encode(self._x.take(size, torch.float32))
                warm = partial(self._format.compute, rows, [Work(packed, 0, size)], torch.float32)
                warm()
                if ways > 1:
                    self._crew.run([warm] * self._threads)

    def compute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """See `Backend.compute`."""
        if self._own is not None and self._own.takes(hidden_RH.shape[0]):
            blocks = self._blocks.get(layer, {})
            return self._own.compute(blocks, hidden_RH, expert_ids_RK, weights_RK)
        return self._compute(self._experts.get(layer, {}), hidden_RH, expert_ids_RK, weights_RK)

    @torch.no_grad()
    def _compute(
        self,
        experts: dict[int, Any],
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        self._use_threads()
        grouping = group_by_expert(expert_ids_RK, weights_RK, self._sizes)
        rows = self._format.encode(hidden_RH)
        dtype = self._format.output_dtype(hidden_RH.dtype)
        y_SH, scale_S = self._compute_places(experts, rows, grouping, dtype)
        if scale_S is None and grouping.is_identity(len(hidden_RH)):
            return y_SH[: len(hidden_RH)].to(partial_dtype(hidden_RH.dtype), copy=True)
        weights_P = grouping.weights
        if scale_S is not None:
            weights_P = weights_P * scale_S[grouping.places]
        out_RH = sum_by_row(y_SH, weights_P, grouping.places, grouping.offsets)
        return out_RH.to(partial_dtype(hidden_RH.dtype))

    def _compute_places(
        self, experts: dict[int, Any], rows: Rows, grouping: Grouping, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Every place's expert output, unweighted, [S, H] of `dtype`, and its scale [S] if any."""
        y_SH = self._y.take(len(grouping.rows), dtype)
        scales = []
        for chunk in chunks(grouping.blocks, _MAX_BLOCK):
            first, last = chunk[0].start, chunk[-1].stop
            works = [
                Work(experts[expert], start - first, stop - first) for expert, start, stop in chunk
            ]
            gathered = self._gather(rows, grouping.rows[first:last])
            jobs = [
                partial(self._compute_works, part, gathered, y_SH[first:last])
                for part in self._divide(works)
            ]
            done = [jobs[0]()] if len(jobs) == 1 else self._crew.run(jobs)
            scales += [scale_C for scale_C in done if scale_C is not None]
        return y_SH, torch.cat(scales) if scales else None

    def _divide(self, works: list[Work]) -> Sequence[Sequence[Work]]:
        """What is computed at the same time; in one part, all threads share each product."""
        read = len(works) * self._bytes / self._loads
        return divide(works, self._threads) if read >= _CREW_BYTES else [works]

    def _compute_works(
        self, works: Sequence[Work], rows: Rows, y_CH: torch.Tensor
    ) -> torch.Tensor | None:
        """Some of a chunk's works, into their places of its outputs; the places' scales if any."""
        first, last = works[0].start, works[-1].stop
        mine = Rows(rows.values[first:last], None if rows.scale is None else rows.scale[first:last])
        moved = [Work(packed, start - first, stop - first) for packed, start, stop in works]
        values, scale_C = self._format.compute(mine, moved, y_CH.dtype)
        torch.cat(list(values), out=y_CH[first:last])
        return scale_C

    def _gather(self, rows: Rows, rows_C: torch.Tensor) -> Rows:
        """The rows of a chunk, in a reused buffer."""
        x_CH = self._x.take(len(rows_C), self._format.dtype)
        torch.index_select(rows.values, 0, rows_C, out=x_CH)
        return Rows(x_CH, None if rows.scale is None else rows.scale[rows_C])

    def _use_threads(self) -> None:
        # A setting of the calling thread, and part of the key of oneDNN's primitives.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)


class _RowBuffer:
    """Rows that are reused between calls: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._bytes = torch.zeros(0, dtype=torch.uint8, device="cpu")

    def take(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] of `dtype`, with any content; valid until the next `take`."""
        needed = rows * self._width * dtype.itemsize
        if needed > len(self._bytes):
            self._bytes = torch.zeros(needed, dtype=torch.uint8, device="cpu")
        return self._bytes[:needed].view(dtype).view(rows, self._width)
