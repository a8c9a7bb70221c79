"""Sorts (row, expert) pairs by local expert, without asking the host anything.

    positions[r, k] = block_m * (blocks of lower slots) + rank of pair (r, k) within its slot

R rows, K experts asked per row, P = R * K pairs of which pair r * K + k is (r, k), E experts of
the layer, L slots held here, B blocks of `block_m` sorted positions, A = B * block_m. Each block
belongs to one slot; the last of a slot may be partly filled. Pairs keep their order within a slot,
so equal inputs give equal bits. B is an upper bound that depends on P, L and `block_m` only: the
grid of the kernels that follow is known before the ids are.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from expert_service.kernels.triton.tables.tiles import next_power_of_2

#: Up to this many pairs, one program compares each pair with each other.
MAX_SMALL_PAIRS = 64
#: Pairs of one program of the other kernels: it compares each with each other, too.
_CHUNK = 128
#: Rows of the block table that one program of the last kernel writes.
_TABLE_ROWS = 32
#: Elements of a one-dimensional tensor in a kernel: one for each thread of a warp, or more.
_MIN_TENSOR = 32
#: Arguments that vary between batches are not specialised on: no batch waits for a compilation.
_VARYING = ("num_pairs", "num_chunks", "max_blocks")


class Unsorted(NamedTuple):
    """What a route is made of."""

    expert_ids_RK: torch.Tensor
    local_slots_E: torch.Tensor | None


class Route(NamedTuple):
    """Where each pair is among the sorted ones."""

    pairs: torch.Tensor  # int32 [A]: the pair at each sorted position; undefined in padding
    block_slots: torch.Tensor  # int32 [B]: the slot of each block, -1 in those not used
    block_rows: torch.Tensor  # int32 [B]: pairs in each block, at its start; 0 in those not used
    num_blocks: torch.Tensor  # int32 [1]: blocks used, which come first
    positions: torch.Tensor  # int32 [R, K]: the sorted position of each pair, -1 if not held
    block_m: int
    num_slots: int
    later: Unsorted | None = None  # of `route_later`: gate_up fills in all but `num_blocks`


def max_blocks(num_pairs: int, num_slots: int, block_m: int) -> int:
    """How many blocks any routing of that many pairs can fill."""
    active = min(num_pairs, num_slots)
    return active + (num_pairs - active) // block_m if active else 0


@triton.jit
def load_slots(ids_ptr, map_ptr, pair, num_pairs, num_experts, num_slots, HAS_MAP: tl.constexpr):
    """The slot of each pair; `num_slots` where it is not held, or there is no such pair."""
    slot = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    if HAS_MAP:
        known = (slot >= 0) & (slot < num_experts)
        slot = tl.load(map_ptr + slot, mask=known, other=-1)
    return tl.where((slot >= 0) & (slot < num_slots), slot, num_slots)


@triton.jit(do_not_specialize=_VARYING)
def _small_kernel(
    ids_ptr,
    map_ptr,
    pairs_ptr,
    block_slots_ptr,
    block_rows_ptr,
    num_blocks_ptr,
    positions_ptr,
    num_pairs,
    num_experts,
    num_slots,
    max_blocks,
    HAS_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pair = tl.arange(0, PAIRS)
    slot = load_slots(ids_ptr, map_ptr, pair, num_pairs, num_experts, num_slots, HAS_MAP)
    held = slot < num_slots
    # Read once more, along the other axis of the comparisons: cheaper than turning a layout.
    other = tl.arange(0, PAIRS)
    other_slot = load_slots(ids_ptr, map_ptr, other, num_pairs, num_experts, num_slots, HAS_MAP)

    same = slot[:, None] == other_slot[None, :]  # [PAIRS, PAIRS]
    count = tl.sum(same.to(tl.int32), axis=1)
    rank = tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), axis=1)
    # Each slot's blocks are counted once, at its first pair.
    other_rank = tl.sum((same & (pair[:, None] < other[None, :])).to(tl.int32), axis=0)
    other_count = tl.sum(same.to(tl.int32), axis=0)
    is_first = (other_rank == 0) & (other_slot < num_slots)
    blocks = tl.where(is_first, (other_count + BLOCK_M - 1) // BLOCK_M, 0)
    lower = other_slot[None, :] < slot[:, None]
    first_block = tl.sum(tl.where(lower, blocks[None, :], 0), axis=1)

    position = first_block * BLOCK_M + rank
    tl.store(pairs_ptr + position, pair, mask=held)
    tl.store(positions_ptr + pair, tl.where(held, position, -1), mask=pair < num_pairs)

    starts_block = held & (rank % BLOCK_M == 0)
    block = first_block + rank // BLOCK_M
    tl.store(block_slots_ptr + block, slot, mask=starts_block)
    tl.store(block_rows_ptr + block, tl.minimum(count - rank, BLOCK_M), mask=starts_block)
    used = tl.sum(blocks, axis=0)
    tl.store(num_blocks_ptr, used)
    unused = (pair >= used) & (pair < max_blocks)  # there are no more blocks than pairs
    tl.store(block_slots_ptr + pair, tl.full([PAIRS], -1, tl.int32), mask=unused)
    tl.store(block_rows_ptr + pair, tl.full([PAIRS], 0, tl.int32), mask=unused)


@triton.jit(do_not_specialize=_VARYING)
def _histogram_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,  # [num_slots, num_chunks]
    num_pairs,
    num_experts,
    num_slots,
    num_chunks,
    HAS_MAP: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    slot = load_slots(ids_ptr, map_ptr, pair, num_pairs, num_experts, num_slots, HAS_MAP)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(slot, BINS)  # what is not held falls into bin num_slots
    tl.store(counts_ptr + bins * num_chunks + chunk, counts, mask=bins < num_slots)


@triton.jit(do_not_specialize=_VARYING)
def _scan_kernel(
    counts_ptr,  # [num_slots, num_chunks]: becomes the number in earlier chunks
    totals_ptr,  # [num_slots]
    num_chunks,
    CHUNKS: tl.constexpr,
):
    row_ptr = counts_ptr + tl.program_id(0) * num_chunks
    before = 0
    start = 0
    while start < num_chunks:
        chunk = start + tl.arange(0, CHUNKS)
        counts = tl.load(row_ptr + chunk, mask=chunk < num_chunks, other=0)
        earlier = before + tl.cumsum(counts, axis=0) - counts
        tl.store(row_ptr + chunk, earlier, mask=chunk < num_chunks)
        before += tl.sum(counts, axis=0)
        start += CHUNKS
    tl.store(totals_ptr + tl.program_id(0), before)


@triton.jit(do_not_specialize=_VARYING)
def _scatter_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    totals_ptr,
    pairs_ptr,
    block_slots_ptr,
    block_rows_ptr,
    num_blocks_ptr,
    positions_ptr,
    num_pairs,
    num_experts,
    num_slots,
    num_chunks,
    max_blocks,
    HAS_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins, mask=bins < num_slots, other=0)
    blocks = (totals + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, axis=0)
    starts = ends - blocks

    # A chunk of pairs. There may be fewer chunks than programs.
    pair = program * CHUNK + tl.arange(0, CHUNK)
    slot = load_slots(ids_ptr, map_ptr, pair, num_pairs, num_experts, num_slots, HAS_MAP)
    held = slot < num_slots
    other = program * CHUNK + tl.arange(0, CHUNK)
    other_slot = load_slots(ids_ptr, map_ptr, other, num_pairs, num_experts, num_slots, HAS_MAP)
    earlier = (slot[:, None] == other_slot[None, :]) & (other[None, :] < pair[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)  # [CHUNK]
    rank += tl.load(counts_ptr + slot * num_chunks + program, mask=held, other=0)
    position = tl.gather(starts, slot, axis=0) * BLOCK_M + rank
    tl.store(pairs_ptr + position, pair, mask=held)
    tl.store(positions_ptr + pair, tl.where(held, position, -1), mask=pair < num_pairs)

    # A part of the block table. A block's slot is the first whose blocks end behind it.
    block = program * TABLE_ROWS + tl.arange(0, TABLE_ROWS)
    owner = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), axis=1)  # [TABLE_ROWS]
    used = owner < num_slots
    owner = tl.where(used, owner, 0)
    left = tl.gather(totals, owner, axis=0) - (block - tl.gather(starts, owner, axis=0)) * BLOCK_M
    tl.store(block_slots_ptr + block, tl.where(used, owner, -1), mask=block < max_blocks)
    rows = tl.where(used, tl.minimum(left, BLOCK_M), 0)
    tl.store(block_rows_ptr + block, rows, mask=block < max_blocks)
    if program == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks, axis=0))


def route(
    expert_ids_RK: torch.Tensor,
    num_slots: int,
    block_m: int,
    local_slots_E: torch.Tensor | None = None,
) -> Route:
    """Sorts pairs by slot. Nothing waits for the device; R may be 0.

    `expert_ids_RK` int32, `local_slots_E` int32: the slot of each expert, -1 where it is not held.
    None: the ids are slots. Ids out of range are not held.
    """
    _check(expert_ids_RK, num_slots, block_m, local_slots_E)
    num_pairs = expert_ids_RK.numel()
    num_blocks = max_blocks(num_pairs, num_slots, block_m)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert_ids_RK.device)

    routed = Route(
        pairs=empty(num_blocks * block_m),
        block_slots=empty(num_blocks),
        block_rows=empty(num_blocks),
        num_blocks=empty(1),
        positions=empty(*expert_ids_RK.shape),
        block_m=block_m,
        num_slots=num_slots,
    )
    if not num_blocks:
        routed.num_blocks.zero_()
        routed.positions.fill_(-1)
        return routed
    outputs = routed[:5]
    has_map = local_slots_E is not None
    inputs = (expert_ids_RK, local_slots_E if has_map else expert_ids_RK)
    num_experts = len(local_slots_E) if local_slots_E is not None else 0
    sizes = (num_pairs, num_experts, num_slots)
    if num_pairs <= MAX_SMALL_PAIRS:
        _small_kernel[(1,)](
            *inputs,
            *outputs,
            *sizes,
            num_blocks,
            HAS_MAP=has_map,
            BLOCK_M=block_m,
            PAIRS=max(_MIN_TENSOR, next_power_of_2(num_pairs)),
        )
        return routed

    num_chunks = triton.cdiv(num_pairs, _CHUNK)
    counts_LC, totals_L = empty(num_slots, num_chunks), empty(num_slots)
    bins = max(_MIN_TENSOR, next_power_of_2(num_slots + 1))  # one for pairs that are not held
    shared = {"HAS_MAP": has_map, "BINS": bins, "CHUNK": _CHUNK}
    _histogram_kernel[(num_chunks,)](*inputs, counts_LC, *sizes, num_chunks, **shared)
    _scan_kernel[(num_slots,)](counts_LC, totals_L, num_chunks, CHUNKS=1024)
    _scatter_kernel[(max(num_chunks, triton.cdiv(num_blocks, _TABLE_ROWS)),)](
        *inputs,
        counts_LC,
        totals_L,
        *outputs,
        *sizes,
        num_chunks,
        num_blocks,
        BLOCK_M=block_m,
        TABLE_ROWS=_TABLE_ROWS,
        **shared,
    )
    return routed


def route_later(
    expert_ids_RK: torch.Tensor,
    num_slots: int,
    block_m: int,
    local_slots_E: torch.Tensor | None = None,
) -> Route:
    """A block for each pair in their own order, without a launch: gate_up fills it in as it runs.

    For few pairs on experts that differ, such as those of one row: pairs of one expert would each
    read its weights.
    """
    _check(expert_ids_RK, num_slots, block_m, local_slots_E)
    num_pairs = expert_ids_RK.numel()

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=expert_ids_RK.device)

    return Route(
        pairs=empty(num_pairs * block_m),
        block_slots=empty(num_pairs),
        block_rows=empty(num_pairs),
        num_blocks=empty(1),
        positions=empty(*expert_ids_RK.shape),
        block_m=block_m,
        num_slots=num_slots,
        later=Unsorted(expert_ids_RK, local_slots_E),
    )


def _check(
    expert_ids_RK: torch.Tensor,
    num_slots: int,
    block_m: int,
    local_slots_E: torch.Tensor | None,
) -> None:
    for name, tensor, rank in (("expert_ids", expert_ids_RK, 2), ("local_slots", local_slots_E, 1)):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.dim() != rank or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected contiguous int32 of "
                f"{rank} dimensions"
            )
    if num_slots < 0:
        raise ValueError(f"num_slots is {num_slots}; expected at least 0")
    if block_m < 1 or block_m & (block_m - 1):
        raise ValueError(f"block_m is {block_m}; expected a power of two")
