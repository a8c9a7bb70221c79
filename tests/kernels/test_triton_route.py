"""Sorting of pairs on the device, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.kernels.triton import reference
from expert_service.kernels.triton.products.route import MAX_SMALL_PAIRS, Route, max_blocks, route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _ids(rows: int, k: int, experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator).argsort(dim=1)[:, :k]
    return ids.to(torch.int32)


def _route(
    ids: torch.Tensor, num_slots: int, block_m: int, local_slots: torch.Tensor | None = None
) -> Route:
    on_device = None if local_slots is None else local_slots.to(DEVICE)
    routed = route(ids.to(DEVICE), num_slots, block_m, on_device)
    return Route(*(tensor.cpu() for tensor in routed[:5]), *routed[5:])


def _assert_equal(actual: Route, expected: Route) -> None:
    """Everything that is defined; padding of `pairs` is not."""
    defined = expected.pairs >= 0
    assert torch.equal(actual.pairs[defined], expected.pairs[defined])
    assert torch.equal(actual.block_slots, expected.block_slots)
    assert torch.equal(actual.block_rows, expected.block_rows)
    assert torch.equal(actual.num_blocks, expected.num_blocks)
    assert torch.equal(actual.positions, expected.positions)
    assert actual[5:] == expected[5:]


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 8, 9, 63, 100])
def test_pairs_are_sorted_as_by_the_reference(rows: int, k: int, block_m: int) -> None:
    ids = _ids(rows, k, experts=11)

    _assert_equal(_route(ids, 11, block_m), reference.route(ids, 11, block_m))


@pytest.mark.parametrize("rows", [5, 40], ids=["small", "large"])
def test_ids_that_are_not_held_are_dropped(rows: int) -> None:
    ids = _ids(rows, 4, experts=12)
    ids[0] = -1
    ids[1, 0] = 12  # beyond the map
    local_slots = torch.tensor([2, -1, -1, 0, -1, 1, -1, -1, -1, 3, 99, -1], dtype=torch.int32)

    routed = _route(ids, 4, 16, local_slots)

    _assert_equal(routed, reference.route(ids, 4, 16, local_slots))
    assert (routed.positions[0] == -1).all()


@pytest.mark.parametrize("rows", [3, 100], ids=["small", "large"])
def test_nothing_held_uses_no_block(rows: int) -> None:
    routed = _route(torch.full((rows, 2), -1, dtype=torch.int32), 5, 16)

    assert routed.num_blocks.item() == 0
    assert (routed.block_slots == -1).all()
    assert (routed.block_rows == 0).all()
    assert (routed.positions == -1).all()


def test_a_server_without_slots_routes_nothing() -> None:
    routed = _route(_ids(4, 2, 6), 0, 16)

    assert routed.num_blocks.item() == 0
    assert (routed.positions == -1).all()


@pytest.mark.parametrize("rows", [64, 65, 300], ids=["small", "large", "chunks"])
def test_all_pairs_on_one_expert_keep_their_order(rows: int) -> None:
    routed = _route(torch.full((rows, 1), 3, dtype=torch.int32), 7, 16)

    assert routed.pairs[:rows].tolist() == list(range(rows))
    assert routed.positions[:, 0].tolist() == list(range(rows))
    assert routed.block_rows.sum() == rows


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 90),
    k=st.integers(1, 8),
    num_slots=st.integers(1, 40),
    block_m=st.sampled_from([16, 32, 128]),
    held=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_any_routing_is_sorted_as_by_the_reference(
    rows: int, k: int, num_slots: int, block_m: int, held: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = num_slots + 8
    ids = _ids(rows, k, experts, seed)
    local_slots = torch.full((experts,), -1, dtype=torch.int32)
    local_slots[torch.randperm(experts, generator=generator)[:num_slots]] = torch.arange(
        num_slots, dtype=torch.int32
    )
    local_slots[torch.rand(experts, generator=generator) > held] = -1

    routed = _route(ids, num_slots, block_m, local_slots)

    _assert_equal(routed, reference.route(ids, num_slots, block_m, local_slots))


@pytest.mark.parametrize("num_pairs", [1, 7, MAX_SMALL_PAIRS, 500])
@pytest.mark.parametrize("num_slots", [1, 4, 100])
@pytest.mark.parametrize("block_m", [1, 16, 128])
def test_the_bound_on_blocks_is_reached_by_the_worst_routing(
    num_pairs: int, num_slots: int, block_m: int
) -> None:
    active = min(num_pairs, num_slots)
    counts = [num_pairs - active + 1] + [1] * (active - 1)

    assert max_blocks(num_pairs, num_slots, block_m) == sum(-(-c // block_m) for c in counts)


def test_the_grid_depends_on_no_id() -> None:
    one_expert, many = torch.zeros(20, 2, dtype=torch.int32), _ids(20, 2, 9)

    shapes = [[tensor.shape for tensor in _route(ids, 9, 16)[:5]] for ids in (one_expert, many)]

    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("ids", "num_slots", "block_m", "local_slots", "message"),
    [
        (torch.zeros(3, 2), 4, 16, None, r"expert_ids is torch.float32 \(3, 2\)"),
        (torch.zeros(3, dtype=torch.int32), 4, 16, None, r"expert_ids is torch.int32 \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.int32).T, 4, 16, None, "contiguous"),
        (_ids(3, 2, 4), 4, 16, torch.zeros(4), r"local_slots is torch.float32 \(4,\)"),
        (_ids(3, 2, 4), -1, 16, None, "num_slots is -1"),
        (_ids(3, 2, 4), 4, 24, None, "block_m is 24"),
    ],
)
def test_a_wrong_input_is_refused(
    ids: torch.Tensor,
    num_slots: int,
    block_m: int,
    local_slots: torch.Tensor | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        route(ids, num_slots, block_m, local_slots)
