"""The grouped experts of 16 and 32 bits, all kernels in a row, against the reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.kernels.triton import reference
from expert_service.kernels.triton.matrices import FP8, ExpertMatrices
from expert_service.kernels.triton.tables.tiles import Tile, Tiles, rule_tiles
from tests.kernels.tolerances import assert_close
from tests.kernels.triton_cases import DTYPES, EXPERTS, experts_of, routing_of, rows_of, run

SIZES = [(64, 32), (48, 20), (17, 5), (1, 1), (130, 70)]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "k"), [*product([0, 1, 63, 100], [1, 2, 8]), *product([9], [3, 4, 5, 6, 7])]
)
def test_experts_equal_the_reference(rows: int, k: int, dtype: torch.dtype) -> None:
    experts = experts_of(dtype, slots=9)
    call = (rows_of(rows, dtype), *routing_of(rows, k, experts=9))

    out = run(*call, experts)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@pytest.mark.parametrize(("hidden", "width"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size_of_expert_works(hidden: int, width: int, dtype: torch.dtype) -> None:
    experts = experts_of(dtype, hidden, width)
    call = (rows_of(9, dtype, hidden), *routing_of(9, 2))

    out = run(*call, experts)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_gives_the_same_result(block_m: int, dtype: torch.dtype) -> None:
    experts = experts_of(dtype, hidden=150, width=140)
    call = (rows_of(40, dtype, 150), *routing_of(40, 2))

    out = run(*call, experts, block_m=block_m)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@pytest.mark.parametrize("group_m", [1, 2, 5, 64])
def test_the_order_of_blocks_does_not_matter(group_m: int) -> None:
    experts = experts_of(torch.float32, hidden=40, width=36)
    call = (rows_of(50, torch.float32, 40), *routing_of(50, 3))
    tile = Tile(16, 16, 16, group_m, 4, 2)

    out = run(*call, experts, tiles=Tiles(tile, tile))

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 63, 100])
def test_all_rows_on_one_expert_equal_the_reference(rows: int, dtype: torch.dtype) -> None:
    """All other experts are empty."""
    experts = experts_of(dtype)
    ids = torch.full((rows, 1), 4, dtype=torch.int32)
    call = (rows_of(rows, dtype), ids, torch.full((rows, 1), 0.25))

    out = run(*call, experts)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 40),
    k=st.integers(1, 8),
    held=st.floats(0, 1),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_any_routing_equals_the_reference(
    rows: int, k: int, held: float, holes: float, seed: int
) -> None:
    """Ids that are not held or ask nobody add nothing; nobody reads their weights."""
    generator = torch.Generator().manual_seed(seed)
    ids, weights = routing_of(rows, k, experts=10, seed=seed)
    ids[torch.rand(ids.shape, generator=generator) < holes] = -1
    local_slots = torch.full((10,), -1, dtype=torch.int32)
    local_slots[torch.randperm(10, generator=generator)[:EXPERTS]] = torch.arange(
        EXPERTS, dtype=torch.int32
    )
    local_slots[torch.rand(10, generator=generator) > held] = -1
    dropped = (ids < 0) | (local_slots[ids.clamp(min=0)] < 0)
    experts, hidden = experts_of(torch.float32), rows_of(rows, torch.float32)
    expected = reference.grouped_swiglu_experts(hidden, ids, weights, experts, local_slots)
    weights[dropped] = torch.nan

    out = run(hidden, ids, weights, experts, local_slots)

    assert_close(out, expected, torch.float32)
    assert (out[dropped.all(dim=1)] == 0).all()


@pytest.mark.parametrize(("slots", "k"), [(0, 2), (EXPERTS, 0)], ids=["no slots", "nobody asked"])
def test_nothing_to_compute_gives_zeros(slots: int, k: int) -> None:
    hidden = rows_of(3, torch.float32)

    out = run(hidden, *routing_of(3, k), experts_of(torch.float32, slots=slots))

    assert torch.equal(out, torch.zeros(3, 48))


@pytest.mark.parametrize("rows", [3, 100])
def test_the_same_call_gives_the_same_bits(rows: int) -> None:
    experts = experts_of(torch.float16)
    call = (rows_of(rows, torch.float16), *routing_of(rows, 4), experts)

    assert torch.equal(run(*call), run(*call))


def test_a_row_does_not_depend_on_the_others_of_its_batch() -> None:
    """With one size of block; another may sum in another order."""
    experts = experts_of(torch.float16)
    hidden, (ids, weights) = rows_of(60, torch.float16), routing_of(60, 3)
    together = run(hidden, ids, weights, experts, block_m=16)

    alone = run(hidden[7:8], ids[7:8], weights[7:8], experts, block_m=16)

    assert torch.equal(alone, together[7:8])


@pytest.mark.parametrize("row", [0, 4])
def test_a_nan_in_one_row_stays_there(row: int) -> None:
    hidden = rows_of(10, torch.float32)
    hidden[row] = torch.nan

    out = run(hidden, *routing_of(10, 3), experts_of(torch.float32))

    assert out.isnan().any(dim=1).nonzero().tolist() == [[row]]


def test_weights_may_be_parts_of_larger_tensors() -> None:
    packed = torch.cat(
        (experts_of(torch.float32).gate_LIH, experts_of(torch.float32).up_LIH), dim=1
    )
    experts = experts_of(torch.float32)
    views = ExpertMatrices(packed[:, :20], packed[:, 20:], experts.down_LHI[:, :, :20])
    call = (torch.randn(5, 60)[:, :48], *routing_of(5, 2))

    out = run(*call, views)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), torch.float32)


@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize(("hidden", "width"), [(272, 160), (150, 140)], ids=["aligned", "ragged"])
@pytest.mark.parametrize("precision", ["plain", "w8a16", "w8a8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_to_multiply_gives_the_same_result(
    dtype: torch.dtype, precision: str, hidden: int, width: int, tma: bool, transposed: bool
) -> None:
    """Ragged matrices are none that the copy engine takes: they come by pointers all the same."""
    experts = experts_of(dtype if precision == "plain" else FP8, hidden, width, slots=3)
    w8a8 = precision == "w8a8"
    tiles = rule_tiles(32, hidden, width, experts.precision(w8a8))
    tiles = Tiles(*(each._replace(transposed=transposed, tma=tma) for each in tiles))
    call = (rows_of(20, dtype, hidden), *routing_of(20, 2, experts=3))

    out = run(*call, experts, tiles=tiles, w8a8=w8a8)

    expected = reference.grouped_swiglu_experts(*call, experts, w8a8=w8a8)
    assert_close(out, expected, FP8 if w8a8 else dtype)
