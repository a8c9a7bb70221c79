"""A batch of one layer, with the kernels of `avx512` on matrices in blocks.

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
from typing import Any, NamedTuple

import torch

from expert_service.kernels.cpu.avx512 import Kernels, Pairs, Rows, compile_kernels, is_packed_at
from expert_service.kernels.cpu.block_product import BlockProduct
from expert_service.kernels.cpu.crew import Crew
from expert_service.kernels.cpu.grouping import Block, BlockSizes, group_by_expert
from expert_service.kernels.cpu.huge_pages import use_huge_pages
from expert_service.kernels.cpu.onednn_formats import ZERO, round_matrix
from expert_service.kernels.cpu.sharing import cost_of, cut, share
from expertmesh.dispatch import partial_dtype
from expertmesh.kernels.compiling import BLOCK, Matrix, pack_blocks
from expertmesh.model import ExpertWeights, ModelSpec

#: Rows of an expert that are one piece of work: 8 ms at most for an expert of DeepSeek-V2-Lite, in
#: which its weights could be read seven times.
_PIECE_ROWS = 96
_SIZES = BlockSizes(lambda rows: rows, _PIECE_ROWS)
#: What a thread takes at a time costs as much as reading so many bytes, or more: 4 ms. Its
#: intermediate is small then, and stays in L2.
_TAKE_BYTES = 64 << 20
#: n threads are worth the waking for n * n times the time in which so many bytes are read: they are
#: woken one after the other, in 8 microseconds or more.
_WAKE_BYTES = 256 << 10
#: Threads rather wait for the slowest, as long as reading so many bytes takes, than meet twice.
_MEET_BYTES = 1 << 20
#: Rows that are summed, or rounded, by one thread at a time.
_SUM_ROWS = 256
#: Of a row that is alone, so many experts are grouped in memory that is kept.
_ROW_PAIRS = 64


def create_avx512_experts(form: str, spec: ModelSpec, crew: Crew) -> Avx512Experts | None:
    """For a model's experts in the onednn backend's format of that name; None where there is no
    way."""
    weights = {"bfloat16": "bf16", "int8": "int8"}.get(form)
    sizes = {layer.width(slot.expert) for layer in spec.layers for slot in layer.slots()}
    if weights is None or any(size % BLOCK for size in (spec.hidden_size, *sizes)):
        return None
    kernels = compile_kernels(weights)
    return None if kernels is None else Avx512Experts(kernels, crew, in_bytes=weights == "int8")


class InBlocks(NamedTuple):
    """An expert's matrices gate, up and down: where they are, and what keeps them there."""

    width: int  # I
    matrices: Sequence[int]
    sides: Sequence[int]  # see `BlockProduct`; 0 where there is none
    kept: Any


class _Batch(NamedTuple):
    """A batch's pairs in blocks, and what the kernels read of them."""

    blocks: Sequence[Block]
    pairs: Pairs

    @property
    def places(self) -> int:
        return self.blocks[-1].stop if self.blocks else 0


class Avx512Experts:
    """Computes with experts that others hold. Not thread-safe; buffers are reused between calls."""

    def __init__(self, kernels: Kernels, crew: Crew, *, in_bytes: bool) -> None:
        self._kernels = kernels
        self._crew = crew
        self._in_bytes = in_bytes
        self._group = 4 if in_bytes else 2
        self._row = _OneRow()
        self._x = _ByteRows()
        self._y = {dtype: _Buffer(dtype) for dtype in (torch.bfloat16, torch.float32)}
        self._identity = torch.arange(_ROW_PAIRS, device="cpu")
        self._of_thread = threading.local()

    def takes(self, rows: int) -> bool:
        """Whether batches of so many rows are computed sooner than oneDNN would."""
        most = self._kernels.most_rows
        return most is None or rows <= most

    @property
    def takes_all(self) -> bool:
        """Whether batches of any number of rows are."""
        return self._kernels.most_rows is None

    def pack(self, weights: ExpertWeights, pause: Callable[[], None]) -> InBlocks:
        """An expert's matrices, which are not kept; `pause` is called after each."""
        blocks, sides = [], []
        for matrix in weights:
            if self._in_bytes:
                rounded, scale_N = round_matrix(matrix)
                sides.append(_side(rounded, scale_N))
            else:
                rounded = matrix.detach().to(torch.bfloat16)
            blocks.append(pack_blocks(rounded))
            use_huge_pages(blocks[-1].data_ptr(), blocks[-1].nbytes)
            pause()
        side_addresses = [side.data_ptr() for side in sides] or [0, 0, 0]
        addresses = [block.data_ptr() for block in blocks]
        return InBlocks(len(weights.gate), addresses, side_addresses, (blocks, sides))

    def adopt(
        self, weights: ExpertWeights, addresses: Sequence[int], kept: object
    ) -> InBlocks | None:
        """The same in memory that `kept` keeps, if its content is the same: oneDNN's layout is its
        own affair: of small matrices of bytes it depends on the number of threads."""
        own = self.pack(weights, lambda: None)
        blocks, sides = own.kept
        if not all(map(is_packed_at, addresses, blocks)):
            return None
        return own._replace(matrices=addresses, kept=(kept, sides))

    def compute(
        self,
        experts: Mapping[int, InBlocks],
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """See `Backend.compute`."""
        R, H = hidden_RH.shape
        is_row = R == 1 and expert_ids_RK.shape[1] <= _ROW_PAIRS
        batch = (self._row.group if is_row else _sort)(expert_ids_RK, weights_RK)
        # A sum is rounded at most once: outputs are bfloat16 where sums are, else float32.
        dtype = hidden_RH.dtype
        y_dtype = partial_dtype(dtype)
        y_SH = self._y[y_dtype].take(batch.places, H)
        x_dtype = y_dtype if self._in_bytes else torch.bfloat16
        x_RH = hidden_RH if dtype == x_dtype else hidden_RH.to(x_dtype)
        if not x_RH.is_contiguous():
            x_RH = x_RH.contiguous()
        if batch.blocks:
            self._run(experts, self._encode(x_RH), H, batch, y_SH, y_dtype)
        out_RH = torch.empty(R, H, dtype=y_dtype, device="cpu")
        out = Matrix(out_RH.data_ptr(), H)
        self._by_rows(R, partial(self._kernels.sum, y_dtype, y_SH, batch.pairs, out, H // BLOCK))
        return out_RH

    def _encode(self, x_RH: torch.Tensor) -> Rows:
        """The batch's rows as they are multiplied."""
        R, H = x_RH.shape
        x = Matrix(x_RH.data_ptr(), H)
        if not self._in_bytes:
            return Rows(x, 0)
        rows = self._x.take(R, H)
        self._by_rows(R, partial(self._kernels.round, x_RH.dtype, x, rows, H // BLOCK))
        return rows

    def _run(
        self,
        experts: Mapping[int, InBlocks],
        x_RH: Rows,
        hidden: int,
        batch: _Batch,
        y_SH: Matrix,
        y_dtype: torch.dtype,
    ) -> None:
        """Every place's expert output."""
        gate_up, down = self._jobs(experts, batch.blocks, hidden)
        identity = self._take_identity(batch.places)
        whole = partial(self._swiglu, x_RH, batch.pairs.rows, identity, y_SH, y_dtype)
        if self._crew.threads == 1 and batch.places <= _PIECE_ROWS:
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
        h = self._take_h(0, batch.places, self._width(down))
        first = partial(self._kernels.gate_up, x_RH, batch.pairs.rows, h.wide)
        second = partial(self._kernels.down, y_dtype, h.rows, identity, y_SH)
        self._share([partial(first, part) for part in cut(gate_up, threads)])
        for job in down:
            self._round(h, job)
        self._share([partial(second, part) for part in cut(down, threads)])

    def _swiglu(
        self,
        x_RH: Rows,
        rows_S: int,
        identity_S: int,
        y_SH: Matrix,
        y_dtype: torch.dtype,
        gate_up: Sequence[BlockProduct],
        down: Sequence[BlockProduct],
    ) -> None:
        """The places of some neighbours, from x to y, on the calling thread."""
        first, stop = down[0].place, down[-1].place + down[-1].rows
        h = self._take_h(first, stop - first, self._width(down))
        self._kernels.gate_up(x_RH, rows_S, h.wide, gate_up)
        for job in down:
            self._round(h, job)
        self._kernels.down(y_dtype, h.rows, identity_S, y_SH, down)

    def _round(self, h: _Intermediate, job: BlockProduct) -> None:
        """The intermediate of a job of `down` in bytes, if weights are so."""
        if self._in_bytes:
            blocks, stop = job.groups * self._group // BLOCK, job.place + job.rows
            self._kernels.round(torch.float32, h.wide, h.rows, blocks, job.place, stop)

    def _jobs(
        self, experts: Mapping[int, InBlocks], blocks: Sequence[Block], hidden: int
    ) -> tuple[list[BlockProduct], list[BlockProduct]]:
        """For both halves of an expert's work, a job for each of its blocks of rows."""
        gate_up, down = [], []
        inputs, outputs = hidden // self._group, hidden // BLOCK
        for expert, start, stop in blocks:
            rows = stop - start
            width, (gate, up, out), (first, second, third), _ = experts[expert]
            gate_up.append(
                BlockProduct(start, rows, gate, up, 0, width // BLOCK, inputs, first, second)
            )
            down.append(
                BlockProduct(start, rows, out, 0, 0, outputs, width // self._group, third, 0)
            )
        return gate_up, down

    def _width(self, down: Sequence[BlockProduct]) -> int:
        """The widest intermediate of some jobs."""
        return self._group * max(job.groups for job in down)

    def _by_rows(self, rows: int, task: Callable[[int, int], None]) -> None:
        """A task for all rows, from the first to before the last given."""
        starts = range(0, rows, _SUM_ROWS)
        self._share([partial(task, start, min(start + _SUM_ROWS, rows)) for start in starts])

    def _share(self, tasks: Sequence[Callable[[], None]]) -> None:
        if len(tasks) == 1:
            tasks[0]()
        else:
            self._crew.share(tasks)

    def _take_identity(self, places: int) -> int:
        """The address of 0, 1, .. places - 1."""
        if places > len(self._identity):
            self._identity = torch.arange(places, device="cpu")
        return self._identity.data_ptr()

    def _take_h(self, first: int, places: int, width: int) -> _Intermediate:
        """For the places from `first` on; one for each thread."""
        buffers: tuple[_Buffer, _ByteRows] | None = getattr(self._of_thread, "h", None)
        if buffers is None:
            dtype = torch.float32 if self._in_bytes else torch.bfloat16
            buffers = self._of_thread.h = _Buffer(dtype), _ByteRows()
        wide, in_bytes = buffers
        values = wide.take(places, width, first)
        rows = in_bytes.take(places, width, first) if self._in_bytes else Rows(values, 0)
        return _Intermediate(values, rows)


def _side(rounded: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """What a matrix of bytes has beside its blocks: see `BlockProduct`."""
    excess_N = ZERO * rounded.sum(dim=1, dtype=torch.int32)
    both = scale_N.view(torch.int32).view(-1, BLOCK), excess_N.view(-1, BLOCK)
    return torch.stack(both, dim=1)


class _Intermediate(NamedTuple):
    """h of some places, as `gate_up` writes and as `down` reads it."""

    wide: Matrix
    rows: Rows


class _Buffer:
    """Rows that are reused between calls: fresh memory costs a page fault every 4 KiB."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._values = torch.empty(0, dtype=dtype, device="cpu")
        self._size = self._address = 0

    def take(self, rows: int, width: int, first: int = 0) -> Matrix:
        """[rows, width], with any content, counted from `first`; valid until the next `take`."""
        if rows * width > self._size:
            self._size = rows * width
            self._values = self._values.new_empty(self._size)
            self._address = self._values.data_ptr()
        return Matrix(self._address - first * width * self._values.itemsize, width)


class _ByteRows:
    """Rows in bytes, and their scales."""

    def __init__(self) -> None:
        self._values, self._scales = _Buffer(torch.uint8), _Buffer(torch.float32)

    def take(self, rows: int, width: int, first: int = 0) -> Rows:
        """See `_Buffer.take`."""
        return Rows(
            self._values.take(rows, width, first), self._scales.take(rows, 1, first).address
        )


def _sort(expert_ids_RK: torch.Tensor, weights_RK: torch.Tensor) -> _Batch:
    grouping = group_by_expert(expert_ids_RK, weights_RK, _SIZES)
    return _Batch(grouping.blocks, Pairs.of(*grouping[1:]))


class _OneRow:
    """Groups the pairs of a row that is alone: into the same memory again and again, unsorted."""

    def __init__(self) -> None:
        weights, offsets = (
            torch.zeros(_ROW_PAIRS, dtype=torch.float32, device="cpu"),
            torch.zeros(2, dtype=torch.int64, device="cpu"),
        )
        rows, places = (
            torch.zeros(_ROW_PAIRS, dtype=torch.int64, device="cpu"),
            torch.arange(_ROW_PAIRS, device="cpu"),
        )
        self._pairs = Pairs.of(rows, weights, places, offsets)
        self._weights, self._offsets = weights.numpy(), offsets.numpy()

    def group(self, expert_ids_1K: torch.Tensor, weights_1K: torch.Tensor) -> _Batch:
        """Valid until the next; what lies behind the last pair is not of the row."""
        (ids,), (weights,) = expert_ids_1K.tolist(), weights_1K.tolist()
        kept = [pair for pair in zip(ids, weights, strict=True) if pair[0] >= 0]
        self._weights[: len(kept)] = [weight for _, weight in kept]
        self._offsets[1] = len(kept)
        return _Batch([Block(e, at, at + 1) for at, (e, _) in enumerate(kept)], self._pairs)
