"""The cluster's counts, report by report, and after a restart from the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from expertmesh.errors import InvalidRequestError
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2
from load_controller.accounts import Accounts
from load_controller.store import Store

LAYER = 2
Counted = tuple[list[int], list[int], int]  # gated, caller gated, repeated pairs


def _report(
    counts: dict[int, Counted], sequence: int = 1, **key: str
) -> pb.ReportAssignmentsRequest:
    layers = [
        router_pb2.LayerLoad(
            layer=layer, counts=gated, caller_gated_counts=caller, repeated_pairs=again, top_k=2
        )
        for layer, (gated, caller, again) in counts.items()
    ]
    key = {"source": "r0", "incarnation": "i"} | key
    return pb.ReportAssignmentsRequest(sequence=sequence, layers=layers, **key)


def _executions(counts: dict[int, list[int]], sequence: int = 1) -> pb.ReportExecutionsRequest:
    layers = [pb.LayerExecutions(layer=layer, counts=each) for layer, each in counts.items()]
    return pb.ReportExecutionsRequest(
        source="s0", incarnation="i", sequence=sequence, layers=layers
    )


def _samples(picks: dict[int, tuple[int, int]], sequence: int) -> pb.ReportAssignmentsRequest:
    samples = [
        pb.LayerSample(layer=layer, changed_picks=changed, sampled_picks=sampled)
        for layer, (changed, sampled) in picks.items()
    ]
    return pb.ReportAssignmentsRequest(
        source="r0", incarnation="i", sequence=sequence, samples=samples
    )


def _loads(accounts: Accounts) -> list[tuple[int, list[int], list[int], int, int]]:
    return [
        (load.layer, list(load.counts), list(load.caller_gated_counts), load.repeated_pairs,
         load.top_k)
        for load in accounts.layer_loads()
    ]  # fmt: skip


def _take(
    accounts: Accounts, request: pb.ReportAssignmentsRequest
) -> dict[int, npt.NDArray[np.int64]] | None:
    """Reads a report, keeps it and counts it, as the controller does; what it adds."""
    news = accounts.read_assignments(request)
    if news is None:
        return None
    accounts.save(news)
    accounts.add(news)
    return news.assignments


@pytest.fixture(params=["running", "restarted"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Accounts:
    """Two routers' reports in two layers, and a server's; by who took them, and by who read them
    from the file."""
    store = Store(tmp_path / "state.sqlite")
    accounts = Accounts(store)
    _take(accounts, _report({LAYER: ([3, 1], [0, 0], 0)}))
    _take(accounts, _report({LAYER: ([5, 1], [2, 4], 7), 1: ([1, 1, 2], [], 0)}, 2))
    _take(accounts, _report({LAYER: ([1, 1], [0, 1], 3)}, source="r1"))
    accounts.take_executions(_executions({LAYER: [10, 11], 1: [1, 1, 2]}))
    return accounts if request.param == "running" else Accounts(store)


def test_each_kind_of_count_is_summed_over_routers_and_kept_apart(filled: Accounts) -> None:
    assert [load[:4] for load in _loads(filled)] == [
        (1, [1, 1, 2], [0, 0, 0], 0),
        (LAYER, [6, 2], [2, 5], 10),
    ]


def test_assignments_are_those_by_either_gate(filled: Accounts) -> None:
    assert {layer: row.tolist() for layer, row in filled.assignments().items()} == {
        1: [1, 1, 2],
        LAYER: [8, 7],
    }


def test_the_skew_of_a_layer_is_that_of_both_gates_counts(filled: Accounts) -> None:
    skews = [load.max_violation for load in filled.layer_loads()]

    assert skews == pytest.approx([0.5, 0.5 / 7.5])


def test_executions_are_a_count_of_their_own(filled: Accounts) -> None:
    executed = [(entry.layer, list(entry.counts)) for entry in filled.layer_executions()]

    assert executed == [(1, [1, 1, 2]), (LAYER, [10, 11])]


def test_a_report_brings_its_assignments_by_the_routers_gate_as_news() -> None:
    accounts = Accounts(Store(":memory:"))

    first = _take(accounts, _report({LAYER: ([3, 1], [9, 9], 5)}))
    second = _take(accounts, _report({LAYER: ([4, 3], [9, 9], 6)}, sequence=2))

    assert first is not None
    assert second is not None
    assert (first[LAYER].tolist(), second[LAYER].tolist()) == ([3, 1], [1, 2])
    _take(accounts, _report({1: ([1, 1], [0, 0], 0)}, sequence=3))
    assert accounts.top_k == {1: 2, LAYER: 2}
    assert [load[4] for load in _loads(accounts)] == [2, 2]


def test_reports_are_counted_by_kind_and_by_whether_they_brought_news() -> None:
    accounts = Accounts(Store(":memory:"))

    for sequence in (1, 2, 2):
        _take(accounts, _report({LAYER: ([1, 1], [0, 0], 0)}, sequence))
    for sequence in (1, 1, 1):
        accounts.take_executions(_executions({LAYER: [1, 1]}, sequence))

    assert _take(accounts, _report({LAYER: ([1, 1], [0, 0], 0)}, 2)) is None
    assert accounts.reports_taken == {"router": 2, "executions": 1}
    assert accounts.reports_dropped == {"router": 2, "executions": 2}


def test_two_runs_of_one_router_are_two_sources() -> None:
    accounts = Accounts(Store(":memory:"))

    for incarnation in ("i", "j"):
        _take(accounts, _report({LAYER: ([1, 2], [0, 0], 0)}, incarnation=incarnation))

    assert _loads(accounts) == [(LAYER, [2, 4], [0, 0], 0, 2)]


def test_counts_of_two_lengths_in_one_layer_are_refused_whole() -> None:
    accounts = Accounts(Store(":memory:"))

    with pytest.raises(InvalidRequestError, match="layer 2 has 2 counts and 3 caller") as refused:
        _take(accounts, _report({1: ([1], [0], 0), LAYER: ([1, 1], [0, 0, 0], 0)}))

    assert refused.value.field == "layers"
    assert _loads(accounts) == []
    assert accounts.reports_taken == {"router": 0, "executions": 0}


def test_changed_picks_are_news_against_the_report_before_and_an_old_one_brings_none() -> None:
    accounts = Accounts(Store(":memory:"))

    first = accounts.take_shares(_samples({LAYER: (2, 10)}, sequence=1))
    second = accounts.take_shares(_samples({LAYER: (3, 30)}, sequence=2))
    old = accounts.take_shares(_samples({LAYER: (9, 90)}, sequence=2))

    assert {layer: (share.changed, share.picks) for layer, share in first.items()} == {
        LAYER: (2, 10)
    }
    assert {layer: (share.changed, share.picks) for layer, share in second.items()} == {
        LAYER: (1, 20)
    }
    assert old == {}


def test_a_layers_top_k_is_unknown_after_a_restart_until_it_is_told_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.sqlite")
    _take(Accounts(store), _report({LAYER: ([1, 1], [0, 0], 0)}))

    accounts = Accounts(store)
    unknown = _loads(accounts)[0][4]
    _take(accounts, _report({LAYER: ([1, 1], [0, 0], 0)}, sequence=2))

    assert (unknown, _loads(accounts)[0][4]) == (0, 2)
