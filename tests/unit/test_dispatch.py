"""Plan and combine, without a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import dispatch
from expertmesh.dispatch import Holders


def _holders(table: list[list[int]], rates: list[float] | None = None) -> Holders:
    holds = np.array(table, dtype=bool)
    return Holders(holds, np.array(rates or [1.0] * len(holds)))


def _pairs(parts: list[dispatch.Part], rows: int, k: int) -> np.ndarray:
    """How often each (row, column) is asked for."""
    asked = np.zeros((rows, k), int)
    for part in parts:
        asked += part.ids_among(rows) >= 0
    return asked


def test_an_expert_with_one_holder_is_asked_there() -> None:
    holders = _holders([[1, 1, 0, 0], [0, 0, 1, 1]])
    ids = np.array([[0, 2], [1, 0], [3, 2]], np.int32)

    parts, unplaced = dispatch.plan(ids, holders)

    assert [part.server for part in parts] == [0, 1]
    np.testing.assert_array_equal(parts[0].rows, [0, 1])
    np.testing.assert_array_equal(parts[0].expert_ids, [[0, -1], [1, 0]])
    np.testing.assert_array_equal(parts[1].rows, [0, 2])
    np.testing.assert_array_equal(parts[1].expert_ids, [[-1, 2], [3, 2]])
    assert unplaced is None


@pytest.mark.parametrize(("rows", "listed"), [(10, False), (9, False), (8, True)])
def test_a_server_that_most_rows_visit_is_sent_every_row(rows: int, listed: bool) -> None:
    ids = np.array([[0]] * rows + [[1]] * (10 - rows), np.int32)

    part = dispatch.plan(ids, _holders([[1, 0], [0, 1]]))[0][0]

    assert (part.rows is not None) is listed
    assert part.pairs == rows
    table = part.ids_among(10)
    assert table.dtype == np.int32
    assert table.tolist() == [[0]] * rows + [[-1]] * (10 - rows)


def test_a_row_without_experts_is_asked_of_nobody() -> None:
    parts, unplaced = dispatch.plan(np.zeros((1, 0), np.int32), _holders([[1], [1]]))

    assert parts == []
    assert unplaced is None


def test_an_expert_without_a_holder_is_reported_and_not_asked_for() -> None:
    holders = _holders([[1, 0, 0], [0, 1, 0]])
    ids = np.array([[0, 2], [1, 0]], np.int32)

    parts, unplaced = dispatch.plan(ids, holders)

    np.testing.assert_array_equal(unplaced, [[-1, 2], [-1, -1]])
    np.testing.assert_array_equal(_pairs(parts, 2, 2), [[1, 0], [1, 1]])


def test_the_shared_expert_is_computed_where_the_row_already_goes() -> None:
    holders = _holders([[1, 0, 1], [0, 1, 1]])
    ids = np.array([[0, 2], [1, 2]] * 20, np.int32)

    parts, _ = dispatch.plan(ids, holders)

    assert sum(len(ids) if p.rows is None else len(p.rows) for p in parts) == len(ids)


def test_of_two_visited_servers_the_one_with_fewer_pairs_takes_the_shared_expert() -> None:
    holders = _holders([[1, 1, 0, 1], [0, 0, 1, 1]])
    ids = np.array([[0, 1, 2, 3]], np.int32)

    parts, _ = dispatch.plan(ids, holders)

    np.testing.assert_array_equal(parts[1].expert_ids, [[-1, -1, 2, 3]])


def test_rows_spread_over_replicas_in_proportion_to_their_rates() -> None:
    holders = _holders([[1], [1], [1]], [1.0, 2.0, 5.0])
    ids = np.zeros((20_000, 1), np.int32)

    parts, _ = dispatch.plan(ids, holders)

    shares = [len(part.rows) / len(ids) for part in parts if part.rows is not None]
    np.testing.assert_allclose(shares, [0.125, 0.25, 0.625], atol=0.015)


def test_single_rows_alternate_between_replicas_as_the_salt_moves() -> None:
    holders = _holders([[1], [1]])
    ids = np.zeros((1, 1), np.int32)

    chosen = [dispatch.plan(ids, holders, salt)[0][0].server for salt in range(400)]

    assert 140 < sum(chosen) < 260


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_pair_is_asked_exactly_once_of_a_server_that_holds_it(data: st.DataObject) -> None:
    servers = data.draw(st.integers(1, 5))
    experts = data.draw(st.integers(1, 8))
    rows = data.draw(st.integers(0, 6))
    k = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 2**16))
    generator = np.random.default_rng(seed)
    holds = generator.random((servers, experts)) < 0.5
    ids = generator.integers(-1, experts, (rows, k)).astype(np.int32)

    parts, unplaced = dispatch.plan(ids, Holders(holds, np.ones(servers)), seed)

    asked = _pairs(parts, rows, k)
    lonely = 0 if unplaced is None else unplaced >= 0
    np.testing.assert_array_equal(asked + lonely, ids >= 0)
    for part in parts:
        held = part.expert_ids[part.expert_ids >= 0]
        assert holds[part.server, held].all()
        assert (part.expert_ids >= 0).any(1).all()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_one_row_is_planned_as_it_would_be_among_others(data: st.DataObject) -> None:
    """By another algorithm, to the same end: the row is first among two, the other asks nothing."""
    servers, experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    seed = data.draw(st.integers(0, 2**16))
    generator = np.random.default_rng(seed)
    holds = generator.random((servers, experts)) < data.draw(st.sampled_from((0.2, 0.5, 0.9)))
    ids = generator.permutation(np.arange(-1, experts))[None, : data.draw(st.integers(1, 9))]
    ids = ids.astype(np.int32)
    holders = Holders(holds, generator.random(servers) + 0.1)

    parts, unplaced = dispatch.plan(ids, holders, seed)
    both = np.concatenate((ids, np.full_like(ids, -1)))
    of_two, unplaced_of_two = dispatch.plan(both, holders, seed)

    assert [part.server for part in parts] == [part.server for part in of_two]
    for part, other in zip(parts, of_two, strict=True):
        assert part.expert_ids.dtype == np.int32
        assert part.rows is None
        np.testing.assert_array_equal(part.expert_ids[0], other.ids_among(2)[0])
    assert (unplaced is None) == (unplaced_of_two is None)
    if unplaced is not None and unplaced_of_two is not None:
        np.testing.assert_array_equal(unplaced[0], unplaced_of_two[0])


def test_combine_of_dispatch_equals_the_dense_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator)
    experts = torch.randn(6, 8, 8, generator=generator)
    weights = torch.rand(50, 3, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(50)]).int()
    table = ids.numpy()
    holders = _holders([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]])

    parts, _ = dispatch.plan(table, holders)
    contributions = []
    for part in parts:
        rows = dispatch.rows_of(hidden, part.rows)
        w = dispatch.rows_of(weights, part.rows)
        out = torch.zeros_like(rows)
        for k in range(3):
            e = torch.from_numpy(part.expert_ids[:, k]).long()
            y = torch.einsum("rh,rhd->rd", rows, experts[e.clamp(min=0)])
            out += torch.where(e >= 0, w[:, k], 0.0)[:, None] * y
        contributions.append((part.rows, out))
    combined = dispatch.combine(hidden, contributions)

    dense = torch.einsum("tk,th,tkhd->td", weights, hidden, experts[ids.long()])
    torch.testing.assert_close(combined, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_room", [False, True], ids=["fresh", "in room"])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 700])
def test_a_sum_over_blocks_of_rows_is_rounded_once(
    rows: int, in_room: bool, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(rows)
    hidden = torch.zeros(rows, 4, dtype=dtype)
    room = torch.full_like(hidden, torch.nan) if in_room else None
    asked = [
        None,
        np.flatnonzero(generator.random(rows) < 0.5),
        np.arange(rows - 1, rows),  # nothing for the first blocks
        np.arange(1),  # and nothing for later ones
    ]
    contributions = [
        (each, torch.randn(rows if each is None else len(each), 4).to(dtype)) for each in asked
    ]

    combined = dispatch.combine(hidden, contributions, room)

    expected = torch.zeros(rows, 4)
    for each, partial in contributions:
        expected[slice(None) if each is None else torch.from_numpy(each)] += partial.float()
    assert combined.dtype == dtype
    assert torch.equal(combined, expected.to(dtype))
    assert room is None or combined is room


def test_a_part_with_every_row_takes_the_tensor_itself_and_another_its_rows() -> None:
    tensor = torch.arange(6.0).view(3, 2)

    assert dispatch.rows_of(tensor, None) is tensor
    assert dispatch.rows_of(tensor, np.array([0, 2])).tolist() == [[0.0, 1.0], [4.0, 5.0]]


def test_one_sum_of_every_row_is_the_answer_in_the_type_of_the_hidden_states() -> None:
    hidden, partial = torch.zeros(3, 4).bfloat16(), torch.randn(3, 4)

    assert torch.equal(dispatch.combine(hidden, [(None, partial)]), partial.bfloat16())
    narrow = partial.bfloat16()
    assert dispatch.combine(hidden, [(None, narrow)]) is narrow


@pytest.mark.parametrize("wide", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_sums_of_a_wider_type_are_added_before_they_are_rounded(wide: tuple[int, ...]) -> None:
    partials = [torch.randn(300, 8), torch.randn(300, 8)]
    partials = [p if i in wide else p.bfloat16() for i, p in enumerate(partials)]

    combined = dispatch.combine(torch.zeros(300, 8).bfloat16(), [(None, p) for p in partials])

    assert combined.dtype == torch.bfloat16
    assert torch.equal(combined, (partials[0].float() + partials[1].float()).bfloat16())


class _Kernel:
    """Adds up what it takes, and keeps what it was asked."""

    def __init__(self, takes: bool) -> None:
        self._takes = takes
        self.asked: list[tuple[torch.Tensor, Sequence[dispatch.Contribution]]] = []

    def takes(self, out_TH: torch.Tensor, contributions: Sequence[dispatch.Contribution]) -> bool:
        self.asked.append((out_TH, contributions))
        return self._takes

    def add(self, out_TH: torch.Tensor, contributions: Sequence[dispatch.Contribution]) -> None:
        assert self.asked == [(out_TH, contributions)]
        out_TH.fill_(9.0)


@pytest.mark.parametrize(("takes", "expected"), [(True, 9.0), (False, 1.0)])
def test_a_kernel_adds_up_what_it_takes_into_the_room(takes: bool, expected: float) -> None:
    hidden, room, kernel = torch.zeros(3, 4), torch.empty(3, 4), _Kernel(takes)
    contributions = [(np.array([0, 2]), torch.ones(2, 4)), (np.array([1]), torch.ones(1, 4))]

    combined = dispatch.combine(hidden, contributions, room, kernel)

    assert combined is room
    assert combined.tolist() == [[expected] * 4] * 3
    assert kernel.asked == [(room, contributions)]


def test_rows_without_contributions_are_zero_and_no_rows_give_none() -> None:
    hidden = torch.randn(3, 4)

    one = dispatch.combine(hidden, [(np.array([1]), torch.ones(1, 4))])
    none = dispatch.combine(hidden[:0], [])

    assert one.tolist() == [[0.0] * 4, [1.0] * 4, [0.0] * 4]
    assert none.shape == (0, 4)


def test_a_large_skewed_batch_is_divided_evenly_and_rows_stay_where_they_go_anyway() -> None:
    generator = np.random.default_rng(0)
    servers, experts, rows, top_k = 8, 64, 1024, 6
    holds = np.zeros((servers, experts), np.bool_)
    holds[np.arange(experts) % servers, np.arange(experts)] = True
    for hot in range(8):  # the hottest have two copies more
        holds[[(hot + 3) % servers, (hot + 6) % servers], hot] = True
    keys = np.log(generator.random((rows, experts))) * np.arange(1, experts + 1)
    ids = np.argsort(-keys, axis=1)[:, :top_k].astype(np.int32)
    parts, _ = dispatch.plan(ids, Holders(holds, np.ones(servers)), salt=3)

    pairs = np.array([part.pairs for part in parts])
    assert pairs.sum() == ids.size
    assert pairs.max() <= 1.05 * pairs.mean()
    sent = sum(rows if part.rows is None else len(part.rows) for part in parts)
    assert sent <= 3.7 * rows, "4.4 if copies are drawn without regard to where rows go"


@pytest.mark.parametrize("seed", range(30))
def test_every_pair_of_a_large_batch_is_asked_once_of_a_server_that_holds_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    servers, experts = int(generator.integers(2, 6)), int(generator.integers(2, 9))
    holds = generator.random((servers, experts)) < generator.choice([0.2, 0.5, 0.9])
    holds[-1] &= seed % 3 > 0  # one that holds nothing
    rows, k = 64 * servers, int(generator.integers(1, 4))
    ids = generator.integers(-1, experts, (rows, k)).astype(np.int32)

    parts, unplaced = dispatch.plan(ids, Holders(holds, generator.random(servers) + 0.1), seed)

    lonely = np.zeros_like(ids, np.bool_) if unplaced is None else unplaced >= 0
    np.testing.assert_array_equal(_pairs(parts, rows, k) + lonely, ids >= 0)
    np.testing.assert_array_equal(lonely, (ids >= 0) & ~holds.any(0)[ids])
    for part in parts:
        assert holds[part.server, part.expert_ids[part.expert_ids >= 0]].all()


def test_a_slow_server_gets_less_of_a_large_batch() -> None:
    ids = np.zeros((600, 1), np.int32)

    parts, _ = dispatch.plan(ids, Holders(np.ones((3, 1), np.bool_), np.array([1.0, 1.0, 0.5])))

    assert [round(part.pairs / 600, 1) for part in parts] == [0.4, 0.4, 0.2]


def test_the_sum_may_take_the_place_of_a_partial_sum_that_is_nobody_elses() -> None:
    hidden = torch.randn(5, 8).bfloat16()
    some = (np.array([0, 3]), torch.randn(2, 8).bfloat16())
    received = np.frombuffer(bytes(torch.randn(5, 8).numpy().data), np.int16)[:40].reshape(5, 8)
    view = (None, torch.from_numpy(received.copy()).view(torch.bfloat16))
    wide, own = (None, torch.randn(5, 8)), (None, torch.randn(5, 8).bfloat16())

    assert dispatch.reusable(hidden, [some, view, wide, own]) is own[1]
    assert dispatch.reusable(hidden, [some, view, wide]) is None
    assert dispatch.reusable(hidden, []) is None


@pytest.mark.parametrize("partials", [2, 3])
@pytest.mark.parametrize("place", [0, 1])
def test_a_sum_in_place_of_a_partial_sum_is_the_same_sum(partials: int, place: int) -> None:
    hidden = torch.randn(300, 8).bfloat16()
    contributions = [(None, torch.randn(300, 8).bfloat16()) for _ in range(partials)]
    total = torch.zeros(300, 8)
    for _, partial in contributions:
        total += partial.float()
    expected = total.bfloat16()

    room = contributions[place][1]
    assert dispatch.combine(hidden, contributions, room) is room
    assert torch.equal(room, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sums_are_the_cpus_whatever_the_default_device_is(dtype: torch.dtype) -> None:
    hidden, part = torch.zeros(3, 4).to(dtype), torch.ones(2, 4).to(dtype)

    with torch.device("meta"):
        combined = dispatch.combine(hidden, [(np.array([0, 2]), part), (np.array([2, 1]), part)])

    assert combined.tolist() == [[1.0] * 4, [1.0] * 4, [2.0] * 4]


@pytest.mark.parametrize(
    ("computed", "sent"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_partial_sums_travel_as_wide_as_the_sum_needs(
    computed: torch.dtype, sent: torch.dtype
) -> None:
    assert dispatch.partial_dtype(computed) == sent
