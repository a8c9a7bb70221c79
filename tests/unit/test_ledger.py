"""Totals that only the newest report of each run changes, and when a window closes."""

from __future__ import annotations

import numpy as np
import pytest

from expertmesh.errors import InvalidRequestError
from load_controller.ledger import Ledger, Report, SourceKey, Window

KEY = SourceKey("r0", "i1")


def _report(sequence: int, counts: list[int], key: SourceKey = KEY, layer: int = 2) -> Report:
    return Report(key, sequence, {layer: np.array(counts)})


def _totals(ledger: Ledger) -> dict[int, list[int]]:
    return {layer: total.tolist() for layer, total in ledger.totals().items()}


def test_news_is_what_the_newest_report_adds_to_the_one_before() -> None:
    ledger = Ledger()

    first = ledger.take(_report(1, [3, 0, 5]))
    second = ledger.take(_report(2, [4, 0, 7]))

    assert first is not None
    assert second is not None
    assert (first[2].tolist(), second[2].tolist()) == ([3, 0, 5], [1, 0, 2])
    assert _totals(ledger) == {2: [4, 0, 7]}


@pytest.mark.parametrize("sequence", [1, 2])
def test_a_report_is_known_by_its_number_and_not_by_what_it_says(sequence: int) -> None:
    ledger = Ledger()
    ledger.take(_report(2, [3, 1]))

    assert ledger.take(_report(sequence, [9, 9])) is None
    assert _totals(ledger) == {2: [3, 1]}


def test_runs_of_the_same_name_are_added_up_and_so_are_other_names() -> None:
    ledger = Ledger()

    for key in (KEY, SourceKey("r0", "i2"), SourceKey("r1", "i1")):
        ledger.take(_report(1, [1, 2], key))

    assert _totals(ledger) == {2: [3, 6]}


def test_a_new_sum_leaves_the_news_of_earlier_reports_as_they_were() -> None:
    ledger = Ledger()
    news = ledger.take(_report(1, [1, 2]))
    before = ledger.totals()
    ledger.take(_report(2, [5, 5]))

    assert news is not None
    assert news[2].tolist() == [1, 2]
    assert before[2].tolist() == [1, 2]


def test_a_layer_that_a_report_leaves_out_is_as_it_was_told_before() -> None:
    ledger = Ledger()
    ledger.take(Report(KEY, 1, {1: np.array([1]), 2: np.array([2])}))
    ledger.take(Report(KEY, 2, {1: np.array([4])}))

    news = ledger.take(Report(KEY, 3, {2: np.array([5])}))

    assert news == {2: np.array([3])}
    assert _totals(ledger) == {1: [4], 2: [5]}


@pytest.mark.parametrize(
    ("key", "counts", "says"),
    [
        (KEY, [7, 2, 8], "r0 reports 2 in layer 2, 3 less than before"),
        (SourceKey("r9", "i"), [1, 1], "r9 reports 2 numbers for layer 2, where others report 3"),
    ],
    ids=["shrinking", "another length"],
)
def test_a_report_that_cannot_be_names_its_source_its_layer_and_the_field(
    key: SourceKey, counts: list[int], says: str
) -> None:
    ledger = Ledger()
    ledger.take(_report(1, [7, 5, 7]))

    with pytest.raises(InvalidRequestError, match=says) as refused:
        ledger.take(_report(2, counts, key))

    assert refused.value.field == "layers"
    assert _totals(ledger) == {2: [7, 5, 7]}


def test_a_window_counts_tokens_as_assignments_by_experts_a_token() -> None:
    window, single = Window(3, 2, opened_at=0.0), Window(3, 1, opened_at=0.0)
    window.counts += [4, 0, 3]
    single.counts += [4, 0, 3]

    assert window.counts.dtype == np.int64
    assert (window.tokens, single.tokens) == (3.5, 7.0)
    assert Window(3, 0, opened_at=0.0).tokens == 0.0  # of a layer whose top_k nobody has told


@pytest.mark.parametrize(
    ("counts", "now", "due"),
    [
        ([3, 4], 10.0, False),
        ([4, 4], 10.0, True),
        ([9, 9], 10.0, True),
        ([1, 0], 14.9, False),
        ([1, 0], 15.0, True),
        ([0, 0], 99.0, False),
    ],
    ids=["few and young", "enough", "more than enough", "nearly old", "old", "old and empty"],
)
def test_a_window_closes_with_enough_tokens_or_with_any_when_it_is_old(
    counts: list[int], now: float, due: bool
) -> None:
    window = Window(2, 2, opened_at=10.0)
    window.counts += counts

    assert window.is_due(now, window_tokens=4, window_s=5.0) is due


def test_a_copy_of_a_window_counts_on_by_itself() -> None:
    window = Window(3, 2, opened_at=10.0)
    window.counts += [1, 0, 4]

    copied = window.copy()
    window.counts += 1

    assert copied.counts.tolist() == [1, 0, 4]
    assert (copied.top_k, copied.opened_at) == (2, 10.0)
