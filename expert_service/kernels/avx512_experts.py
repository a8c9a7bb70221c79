"""A batch of one layer, with the kernels of `avx512` on matrices that oneDNN has packed.

    y[p] = W_down @ (silu(W_gate @ x[p]) * (W_up @ x[p]))
    out[r] = sum of weight[p] * y[p] over the pairs p of row r

Pairs are sorted by expert, as in `onednn`; rows of x are read where they are. Threads take pieces
of work as they get free: experts with some of their rows, or, of few experts, some blocks of their
outputs. R rows, S places of the sorted pairs, H hidden and I intermediate size.

Reading weights leaves nothing else in the caches: of a row that is alone each call of torch costs
10 to 30 microseconds then, of 4 milliseconds in all. So few are made, and addresses are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isqrt
from typing import NamedTuple

import torch

from expert_service.kernels.avx512 import (
    BLOCK,
    Job,
    Kernels,
    Matrix,
    Pairs,
    compile_kernels,
    is_packed_in_blocks,
)
from expert_service.kernels.crew import Crew
from expert_service.kernels.grouping import Block, BlockSizes, group_by_expert
from expert_service.kernels.onednn_formats import PackedExpert
from expert_service.kernels.sharing import cost_of, cut, share
from expertmesh.model import ModelSpec

#: Rows of an expert that are one piece of work: 8 ms at most for an expert of DeepSeek-V2-Lite, in
#: which its weights could be read seven times.
_PIECE_ROWS = 96
_SIZES = BlockSizes(lambda rows: rows, _PIECE_ROWS)
#: What a thread takes at a time costs as much as reading so many bytes, or more: 4 ms.
_TAKE_BYTES = 64 << 20
#: n threads are worth the waking for n * n times the time in which so many bytes are read: they are
#: woken one after the other, in 8 microseconds or more.
_WAKE_BYTES = 256 << 10
#: Threads rather wait for the slowest, as long as reading so many bytes takes, than meet twice.
_MEET_BYTES = 1 << 20
#: Rows that are summed by one thread at a time.
_SUM_ROWS = 256
#: Of a row that is alone, so many experts are grouped in memory that is kept.
_ROW_PAIRS = 64


def create_avx512_experts(spec: ModelSpec, crew: Crew) -> Avx512Experts | None:
    """For the experts of a model that are packed in bfloat16; None where that is not possible."""
    hidden = spec.hidden_size
    widths = {layer.width(slot.expert) for layer in spec.layers for slot in layer.slots()}
    if not all(
        is_packed_in_blocks(width, hidden) and is_packed_in_blocks(hidden, width)
        for width in sorted(widths)
    ):
        return None
    kernels = compile_kernels()
    return None if kernels is None else Avx512Experts(kernels, crew)


class _Batch(NamedTuple):
    """A batch's pairs in blocks, and what the kernels read of them."""

    blocks: Sequence[Block]
    pairs: Pairs

    @property
    def places(self) -> int:
        return self.blocks[-1].stop if self.blocks else 0


class Avx512Experts:
    """Computes with experts that others hold. Not thread-safe; buffers are reused between calls."""

    def __init__(self, kernels: Kernels, crew: Crew) -> None:
        self._kernels = kernels
        self._crew = crew
        self._row = _OneRow()
        self._y = {dtype: _Buffer(dtype) for dtype in (torch.bfloat16, torch.float32)}
        self._identity = torch.arange(_ROW_PAIRS)
        self._of_thread = threading.local()

    def takes(self, rows: int) -> bool:
        """Whether batches of so many rows are computed sooner than oneDNN would."""
        return self._kernels.most_rows is None or rows <= self._kernels.most_rows

    def compute(
        self,
        experts: Mapping[int, PackedExpert],
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """See `Backend.compute`. `experts` are packed matrices."""
        R, H = hidden_RH.shape
        is_row = R == 1 and expert_ids_RK.shape[1] <= _ROW_PAIRS
        batch = (self._row.group if is_row else _group)(expert_ids_RK, weights_RK)
        # A sum is rounded once: to the caller's dtype, so float32 where outputs have another.
        dtype = hidden_RH.dtype
        y_dtype = dtype if dtype == torch.bfloat16 else torch.float32
        y_SH = self._y[y_dtype].take(batch.places, H)
        x_RH = hidden_RH if dtype == torch.bfloat16 else hidden_RH.to(torch.bfloat16)
        if not x_RH.is_contiguous():
            x_RH = x_RH.contiguous()
        if batch.blocks:
            self._run(experts, Matrix(x_RH.data_ptr(), H), batch, y_SH, y_dtype)
        out_RH = torch.empty(R, H, dtype=y_dtype)
        out = Matrix(out_RH.data_ptr(), H)
        sums = partial(self._kernels.sum, y_dtype, y_SH, batch.pairs, out, H // BLOCK)
        starts = range(0, R, _SUM_ROWS)
        self._share([partial(sums, start, min(start + _SUM_ROWS, R)) for start in starts])
        return out_RH if y_dtype == dtype else out_RH.to(dtype)

    def _run(
        self,
        experts: Mapping[int, PackedExpert],
        x_RH: Matrix,
        batch: _Batch,
        y_SH: Matrix,
        y_dtype: torch.dtype,
    ) -> None:
        """Every place's expert output."""
        gate_up, down = _jobs(experts, batch.blocks, x_RH.stride)
        identity = self._take_identity(batch.places)
        whole = partial(self._swiglu, x_RH, batch.pairs.rows, identity, y_SH, y_dtype)
        if self._crew.threads == 1:
            whole(gate_up, down)
            return
        costs = [2 * cost_of(one) + cost_of(two) for one, two in zip(gate_up, down, strict=True)]
        total = sum(costs)
        threads = min(self._crew.threads, 1 + isqrt(int(total) // _WAKE_BYTES))
        pieces = max(threads, int(total) // _TAKE_BYTES)
        spans = share(costs, pieces, _MEET_BYTES if pieces == threads else total)
        if spans is not None:
            self._share([partial(whole, gate_up[span], down[span]) for span in spans])
            return
        h = self._take_h(batch.places, _width(down))
        first = partial(self._kernels.gate_up, x_RH, batch.pairs.rows, h)
        second = partial(self._kernels.down, y_dtype, h, identity, y_SH)
        self._share([partial(first, part) for part in cut(gate_up, threads)])
        self._share([partial(second, part) for part in cut(down, threads)])

    def _swiglu(
        self,
        x_RH: Matrix,
        rows_S: int,
        identity_S: int,
        y_SH: Matrix,
        y_dtype: torch.dtype,
        gate_up: Sequence[Job],
        down: Sequence[Job],
    ) -> None:
        """The places of some neighbours, from x to y, on the calling thread."""
        first, stop = down[0].place, down[-1].place + down[-1].rows
        h = self._take_h(stop - first, _width(down)).before(first)
        self._kernels.gate_up(x_RH, rows_S, h, gate_up)
        self._kernels.down(y_dtype, h, identity_S, y_SH, down)

    def _share(self, tasks: Sequence[Callable[[], None]]) -> None:
        if len(tasks) == 1:
            tasks[0]()
        else:
            self._crew.share(tasks)

    def _take_identity(self, places: int) -> int:
        """The address of 0, 1, .. places - 1."""
        if places > len(self._identity):
            self._identity = torch.arange(places)
        return self._identity.data_ptr()

    def _take_h(self, places: int, width: int) -> Matrix:
        """One for each thread."""
        buffer: _Buffer | None = getattr(self._of_thread, "h", None)
        if buffer is None:
            buffer = self._of_thread.h = _Buffer(torch.bfloat16)
        return buffer.take(places, width)


class _Buffer:
    """Rows that are reused between calls: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._values = torch.empty(0, dtype=dtype)
        self._size = self._address = 0

    def take(self, rows: int, width: int) -> Matrix:
        """[rows, width], with any content; valid until the next `take`."""
        if rows * width > self._size:
            self._size = rows * width
            self._values = self._values.new_empty(self._size)
            self._address = self._values.data_ptr()
        return Matrix(self._address, width)


def _group(expert_ids_RK: torch.Tensor, weights_RK: torch.Tensor) -> _Batch:
    grouping = group_by_expert(expert_ids_RK, weights_RK, _SIZES)
    return _Batch(grouping.blocks, Pairs.of(*grouping[1:]))


class _OneRow:
    """Groups the pairs of a row that is alone: into the same memory again and again, unsorted."""

    def __init__(self) -> None:
        weights, offsets = torch.zeros(_ROW_PAIRS), torch.zeros(2, dtype=torch.int64)
        rows, places = torch.zeros(_ROW_PAIRS, dtype=torch.int64), torch.arange(_ROW_PAIRS)
        self._pairs = Pairs.of(rows, weights, places, offsets)
        self._weights, self._offsets = weights.numpy(), offsets.numpy()

    def group(self, expert_ids_1K: torch.Tensor, weights_1K: torch.Tensor) -> _Batch:
        """Valid until the next; what lies behind the last pair is not of the row."""
        (ids,), (weights,) = expert_ids_1K.tolist(), weights_1K.tolist()
        kept = [pair for pair in zip(ids, weights, strict=True) if pair[0] >= 0]
        self._weights[: len(kept)] = [weight for _, weight in kept]
        self._offsets[1] = len(kept)
        return _Batch([Block(e, at, at + 1) for at, (e, _) in enumerate(kept)], self._pairs)


def _jobs(
    experts: Mapping[int, PackedExpert], blocks: Sequence[Block], hidden: int
) -> tuple[list[Job], list[Job]]:
    """For both halves of an expert's work, a job for each of its blocks of rows."""
    gate_up, down = [], []
    for expert, start, stop in blocks:
        rows = stop - start
        width = experts[expert].width
        gate, up, out = experts[expert].addresses
        gate_up.append(Job(start, rows, gate, up, 0, width // BLOCK, hidden // 2))
        down.append(Job(start, rows, out, 0, 0, hidden // BLOCK, width // 2))
    return gate_up, down


def _width(down: Sequence[Job]) -> int:
    """The widest intermediate of some jobs."""
    return 2 * max(job.pairs for job in down)
