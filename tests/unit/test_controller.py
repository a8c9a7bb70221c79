"""The load controller's counts and biases, without a network."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from expertmesh.errors import InvalidRequestError
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import tensor_pb2
from load_controller.ledger import Ledger, Report, SourceKey
from load_controller.store import Store
from tests.controller import LAYER, make_announcement, make_controller, make_report


@pytest.mark.parametrize("seed", range(30))
def test_totals_are_exact_whatever_is_dropped_repeated_or_shuffled(seed: int) -> None:
    chance = random.Random(seed)
    ledger, expected, sent = Ledger(), np.zeros(4, np.int64), []
    for source in range(3):
        for incarnation in range(2):
            total = np.zeros(4, np.int64)
            key = SourceKey(f"r{source}", f"i{incarnation}")
            for sequence in range(1, 8):
                total = total + np.array([chance.randint(0, 5) for _ in range(4)])
                sent.append(Report(key, sequence, {LAYER: total}))
            expected += total
    last = [report for report in sent if report.sequence == 7]
    noisy = [r for r in sent if chance.random() < 0.7] * 2
    chance.shuffle(noisy)

    for report in [*noisy, *last]:  # the last report of each arrives at some time
        ledger.take(report)

    np.testing.assert_array_equal(ledger.totals()[LAYER], expected)


def test_a_repeated_report_brings_no_news() -> None:
    controller = make_controller()

    controller.take_assignments(make_report([3, 1]), now=0.0)
    controller.take_assignments(make_report([3, 1]), now=0.0)
    controller.take_assignments(make_report([9, 9], sequence=0), now=0.0)

    assert list(controller.load(now=0.0).layers[0].counts) == [3, 1]


@pytest.mark.parametrize(
    ("counts", "problem"),
    [([5, 0], "1 less than before"), ([3, 1, 0], "7 numbers for layer 2, where others report 5")],
    ids=["shrinking", "another length"],
)
def test_impossible_totals_are_refused_and_change_nothing(counts: list[int], problem: str) -> None:
    controller = make_controller(mode="adaptive", window_tokens=1)
    controller.take_assignments(make_report([3, 1]), now=0.0)
    before = controller.load(now=0.0)

    with pytest.raises(InvalidRequestError, match=problem):
        controller.take_assignments(make_report(counts, sequence=2), now=0.0)
    refused = controller.load(now=0.0)
    controller.take_assignments(make_report([4, 1], sequence=2), now=0.0)

    assert refused == before
    assert list(controller.load(now=0.0).layers[0].counts) == [4, 1]


def test_a_layer_that_a_report_leaves_out_keeps_its_counts() -> None:
    ledger = Ledger()
    key = SourceKey("r0", "i")
    ledger.take(Report(key, 1, {1: np.array([1]), 2: np.array([2])}))
    ledger.take(Report(key, 2, {1: np.array([4])}))

    news = ledger.take(Report(key, 3, {2: np.array([5])}))

    assert news == {2: np.array([3])}
    assert ledger.totals() == {1: np.array([4]), 2: np.array([5])}


def test_a_report_and_the_window_that_it_closes_are_stored_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.sqlite"
    controller = make_controller(path, mode="adaptive", window_tokens=1)
    version = controller.bias_version

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Store, "save_bias", full)
    with pytest.raises(OSError, match="disk full"):
        controller.take_assignments(make_report([3, 1]), now=0.0)
    restarted = make_controller(path)

    assert controller.bias_version == version
    assert restarted.bias_version == version
    assert len(restarted.load(now=0.0).layers) == 0


def test_rules_that_fail_stop_the_beats_and_no_count_until_a_mode_is_set() -> None:
    controller = make_controller(mode="adaptive", window_tokens=1)
    controller.take_assignments(make_report([3, 1]), now=0.0)
    published, rules = controller.bias(), controller.balancer.close_due
    controller.beat(now=1.0)

    def broken(now: float) -> bool:
        raise ValueError("a bug")

    controller.balancer.close_due = broken  # type: ignore[method-assign]
    controller.take_assignments(make_report([5, 1], sequence=2), now=2.0)
    controller.beat(now=2.0)
    beats, kept = controller.beats, controller.bias()
    controller.balancer.close_due = rules  # type: ignore[method-assign]
    controller.set_mode("adaptive")
    controller.beat(now=3.0)

    assert (beats, controller.beats) == (1, 2)
    assert kept == published
    assert list(controller.load(now=0.0).layers[0].counts) == [5, 1]


def test_a_reset_starts_from_zero_and_keeps_the_mode() -> None:
    controller = make_controller(mode="adaptive", window_tokens=1)
    controller.take_assignments(make_report([9, 1]), now=0.0)
    moved = controller.bias()

    version = controller.set_mode("", reset=True)

    assert len(moved.layers) == 1
    assert controller.bias() == pb.BiasUpdate(version=version, mode="adaptive")
    assert version == moved.version + 1


def test_a_sample_of_another_shape_than_the_gates_is_refused() -> None:
    controller = make_controller()
    gate = pb.LayerGate(layer=LAYER, score="sigmoid", top_k=1, n_group=1, topk_group=1,
                        group_score="max", trained_bias=[0.0, 0.0])  # fmt: skip
    controller.add_router(pb.WatchClusterRequest(router_id="r0", incarnation="i", gates=[gate]))
    report = make_report([1, 1])
    report.samples.add(layer=LAYER).scores.CopyFrom(
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1, 3], data=bytes(12))
    )

    with pytest.raises(InvalidRequestError, match="expected \\[n, 2\\] float32"):
        controller.take_assignments(report, now=0.0)


def test_maxvio_is_of_both_kinds_of_count() -> None:
    controller = make_controller()
    report = make_report([3, 1])
    report.layers[0].caller_gated_counts[:] = [0, 2]

    controller.take_assignments(report, now=0.0)

    assert controller.load(now=0.0).layers[0].max_violation == 0.0


def test_state_survives_a_restart_and_versions_go_on(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    first = make_controller(path, mode="adaptive", window_tokens=1, update_rate=0.5)
    first.announce(make_announcement(), now=0.0)
    first.take_assignments(make_report([9, 1]), now=0.0)
    published = first.bias()

    second = make_controller(path, mode="adaptive", window_tokens=1, update_rate=0.5)
    again = second.bias()
    second.take_assignments(make_report([9, 1]), now=0.0)
    second.take_assignments(make_report([99, 1], sequence=2), now=0.0)

    assert again == published
    assert second.directory().servers == first.directory().servers
    assert second.epoch == first.epoch
    assert list(second.load(now=0.0).layers[0].counts) == [99, 1]
    assert second.bias().version == published.version + 1
    assert list(second.bias().layers[0].delta) == [-1.0, 1.0]


def test_a_window_closes_after_enough_tokens_and_moves_the_bias_by_the_rate() -> None:
    controller = make_controller(mode="adaptive", window_tokens=5, update_rate=0.25)
    version = controller.bias_version

    controller.take_assignments(make_report([4, 4]), now=0.0)  # 4 tokens: not yet
    early = controller.bias_version
    controller.take_assignments(make_report([8, 4], sequence=2), now=0.0)

    assert early == version
    assert controller.bias_version == version + 1
    assert list(controller.bias().layers[0].delta) == [-0.25, 0.25]


def test_a_window_closes_after_its_time_with_few_tokens() -> None:
    controller = make_controller(mode="adaptive", window_tokens=1000, window_s=2.0)
    controller.take_assignments(make_report([2, 0]), now=10.0)

    controller.close_windows(11.9)
    early = len(controller.bias().layers)
    controller.close_windows(12.0)

    assert early == 0
    assert len(controller.bias().layers) == 1


def test_the_delta_stays_within_its_bound() -> None:
    controller = make_controller(mode="adaptive", window_tokens=1, update_rate=0.4, max_delta=0.5)

    for sequence in range(1, 6):
        controller.take_assignments(make_report([9 * sequence, sequence], sequence), now=0.0)

    assert list(controller.bias().layers[0].delta) == [-0.5, 0.5]


def test_frozen_publishes_no_delta_and_freezing_takes_one_back() -> None:
    frozen = make_controller(window_tokens=1)
    adaptive = make_controller(mode="adaptive", window_tokens=1)

    frozen.take_assignments(make_report([9, 1]), now=0.0)
    adaptive.take_assignments(make_report([9, 1]), now=0.0)
    moved = adaptive.bias()
    version = adaptive.set_mode("frozen")

    assert len(frozen.bias().layers) == 0
    assert len(moved.layers) == 1
    assert version == moved.version + 1
    assert len(adaptive.bias().layers) == 0
    assert adaptive.bias().mode == "frozen"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="sideways"):
        make_controller().set_mode("sideways")
