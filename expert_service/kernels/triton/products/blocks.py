"""Which block of rows, and which of columns, a program of the grouped products computes."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

import triton
import triton.language as tl

from expert_service.kernels.triton.products.route import load_slots


@triton.jit
def place(num_blocks, COLUMNS: tl.constexpr, group_m):
    """The block and the column of this program.

    Blocks of one group run side by side, column by column: those of one slot share its weights.
    """
    group = tl.program_id(0) // (group_m * COLUMNS)
    group_rows = tl.minimum(num_blocks - group * group_m, group_m)
    inside = tl.program_id(0) % (group_m * COLUMNS)
    return group * group_m + inside % group_rows, inside // group_rows


@triton.jit
def sort_pair(
    block,
    column,
    pairs_ptr,
    block_slots_ptr,
    block_rows_ptr,
    num_blocks,
    positions_ptr,
    ids_ptr,
    map_ptr,
    num_experts,
    num_slots,
    BLOCK_M: tl.constexpr,
):
    """The slot and the number of rows of a block that is one pair's, of `route_later`.

    The program of the first column writes them down for the kernels that follow.
    """
    slot = load_slots(
        ids_ptr, map_ptr, block, num_blocks, num_experts, num_slots, map_ptr is not None
    )
    held = slot < num_slots
    rows = held.to(tl.int32)
    if column == 0:
        tl.store(block_slots_ptr + block, tl.where(held, slot, -1))
        tl.store(block_rows_ptr + block, rows)
        tl.store(pairs_ptr + block * BLOCK_M, block)
        tl.store(positions_ptr + block, tl.where(held, block * BLOCK_M, -1))
    return slot, rows
