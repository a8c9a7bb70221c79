"""The load controller's decisions, without a network."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertmesh.config import BalanceConfig
from expertmesh.errors import InvalidRequestError, MismatchError, SupersededError
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import expert_pb2, router_pb2, tensor_pb2
from load_controller.controller import FORGET_AFTER_S, LOST_AFTER_S, LoadController
from load_controller.ledger import Ledger, Report, SourceKey
from load_controller.store import Store

LAYER = 2


def _controller(path: Path | str = ":memory:", **balance: object) -> LoadController:
    return LoadController(Store(path), BalanceConfig(**balance), lambda: None)  # type: ignore[arg-type]


def _announce(
    server: str = "s0", started: int = 1, state: str = "ready", experts: tuple[int, ...] = (0, 1)
) -> pb.AnnounceServerRequest:
    return pb.AnnounceServerRequest(
        server=router_pb2.ServerStatus(
            server_id=server, incarnation=f"i{started}", endpoint="h:1", state=state
        ),
        protocol_version=PROTOCOL_VERSION,
        checkpoint_digest="digest",
        started_at_ns=started,
        layers=[expert_pb2.LayerSlots(layer=LAYER, experts=experts)],
    )


def _report(
    counts: list[int], sequence: int = 1, source: str = "r0"
) -> pb.ReportAssignmentsRequest:
    layer = router_pb2.LayerLoad(
        layer=LAYER, counts=counts, caller_gated_counts=[0] * len(counts), top_k=2
    )
    return pb.ReportAssignmentsRequest(
        source=source, incarnation="i", sequence=sequence, layers=[layer]
    )


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
    controller = _controller()

    controller.take_assignments(_report([3, 1]), now=0.0)
    controller.take_assignments(_report([3, 1]), now=0.0)
    controller.take_assignments(_report([9, 9], sequence=0), now=0.0)

    assert list(controller.load(now=0.0).layers[0].counts) == [3, 1]


@pytest.mark.parametrize(
    ("counts", "problem"),
    [([5, 0], "1 less than before"), ([3, 1, 0], "7 numbers for layer 2, where others report 5")],
    ids=["shrinking", "another length"],
)
def test_impossible_totals_are_refused_and_change_nothing(counts: list[int], problem: str) -> None:
    controller = _controller(mode="adaptive", window_tokens=1)
    controller.take_assignments(_report([3, 1]), now=0.0)
    before = controller.load(now=0.0)

    with pytest.raises(InvalidRequestError, match=problem):
        controller.take_assignments(_report(counts, sequence=2), now=0.0)
    refused = controller.load(now=0.0)
    controller.take_assignments(_report([4, 1], sequence=2), now=0.0)

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
    controller = _controller(path, mode="adaptive", window_tokens=1)
    version = controller.bias_version

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Store, "save_bias", full)
    with pytest.raises(OSError, match="disk full"):
        controller.take_assignments(_report([3, 1]), now=0.0)
    restarted = _controller(path)

    assert controller.bias_version == version
    assert restarted.bias_version == version
    assert len(restarted.load(now=0.0).layers) == 0


def test_rules_that_fail_stop_the_beats_and_no_count_until_a_mode_is_set() -> None:
    controller = _controller(mode="adaptive", window_tokens=1)
    controller.take_assignments(_report([3, 1]), now=0.0)
    published, rules = controller.bias(), controller.balancer.close_due
    controller.beat(now=1.0)

    def broken(now: float) -> bool:
        raise ValueError("a bug")

    controller.balancer.close_due = broken  # type: ignore[method-assign]
    controller.take_assignments(_report([5, 1], sequence=2), now=2.0)
    controller.beat(now=2.0)
    beats, kept = controller.beats, controller.bias()
    controller.balancer.close_due = rules  # type: ignore[method-assign]
    controller.set_mode("adaptive")
    controller.beat(now=3.0)

    assert (beats, controller.beats) == (1, 2)
    assert kept == published
    assert list(controller.load(now=0.0).layers[0].counts) == [5, 1]


def test_a_reset_starts_from_zero_and_keeps_the_mode() -> None:
    controller = _controller(mode="adaptive", window_tokens=1)
    controller.take_assignments(_report([9, 1]), now=0.0)
    moved = controller.bias()

    version = controller.set_mode("", reset=True)

    assert len(moved.layers) == 1
    assert controller.bias() == pb.BiasUpdate(version=version, mode="adaptive")
    assert version == moved.version + 1


def test_routers_are_listed_with_the_versions_that_they_use() -> None:
    controller = _controller()
    controller.add_router(pb.WatchClusterRequest(router_id="r0", incarnation="i", endpoint="h:1"))
    silent = list(controller.load(now=0.0).routers)
    report = _report([1, 1])
    report.bias_version, report.epoch = 1, 4
    controller.take_assignments(report, now=0.0)

    assert silent == [pb.RouterState(router_id="r0", endpoint="h:1", away_s=-1.0)]
    assert list(controller.load(now=0.0).routers) == [
        pb.RouterState(router_id="r0", endpoint="h:1", bias_version=1, epoch=4, away_s=-1.0)
    ]


def test_a_router_that_went_without_a_word_is_missed_and_one_that_took_leave_is_not() -> None:
    controller = _controller()
    for name in ("lost", "left", "late"):
        controller.add_router(pb.WatchClusterRequest(router_id=name, incarnation="i"))
    goodbye = {name: _report([1, 1], source=name) for name in ("left", "late")}
    for report in goodbye.values():
        report.leaving = True

    controller.take_assignments(goodbye["left"], now=0.0)
    for name in ("lost", "left", "late"):
        controller.remove_router(name, "i", now=10.0)
    controller.take_assignments(goodbye["late"], now=10.1)
    missed = list(controller.load(now=15.0).routers)
    controller.add_router(pb.WatchClusterRequest(router_id="lost", incarnation="i"))

    assert missed == [pb.RouterState(router_id="lost", away_s=5.0)]
    assert [router.away_s for router in controller.load(now=16.0).routers] == [-1.0]
    assert len(controller.directory().routers) == 1


def test_directory_versions_go_on_after_a_restart(tmp_path: Path) -> None:
    first = _controller(tmp_path / "state.sqlite")
    first.add_router(pb.WatchClusterRequest(router_id="r0", incarnation="i"))
    first.remove_router("r0", "i", now=0.0)

    second = _controller(tmp_path / "state.sqlite")

    assert second.directory_version == first.directory_version


@pytest.mark.parametrize(
    "change",
    [{"score": "relu"}, {"top_k": 3}, {"n_group": 3}, {"group_score": "sum"}],
    ids=str,
)
def test_a_gate_that_cannot_choose_is_refused(change: dict[str, Any]) -> None:
    gate = pb.LayerGate(layer=LAYER, score="sigmoid", top_k=1, n_group=1, topk_group=1,
                        group_score="max", trained_bias=[0.0, 0.0])  # fmt: skip
    gate.MergeFrom(pb.LayerGate(**change))

    with pytest.raises(InvalidRequestError):
        _controller().add_router(pb.WatchClusterRequest(router_id="r0", gates=[gate]))


def test_a_sample_of_another_shape_than_the_gates_is_refused() -> None:
    controller = _controller()
    gate = pb.LayerGate(layer=LAYER, score="sigmoid", top_k=1, n_group=1, topk_group=1,
                        group_score="max", trained_bias=[0.0, 0.0])  # fmt: skip
    controller.add_router(pb.WatchClusterRequest(router_id="r0", incarnation="i", gates=[gate]))
    report = _report([1, 1])
    report.samples.add(layer=LAYER).scores.CopyFrom(
        tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1, 3], data=bytes(12))
    )

    with pytest.raises(InvalidRequestError, match="expected \\[n, 2\\] float32"):
        controller.take_assignments(report, now=0.0)


def test_maxvio_is_of_both_kinds_of_count() -> None:
    controller = _controller()
    report = _report([3, 1])
    report.layers[0].caller_gated_counts[:] = [0, 2]

    controller.take_assignments(report, now=0.0)

    assert controller.load(now=0.0).layers[0].max_violation == 0.0


def test_state_survives_a_restart_and_versions_go_on(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    first = _controller(path, mode="adaptive", window_tokens=1, update_rate=0.5)
    first.announce(_announce(), now=0.0)
    first.take_assignments(_report([9, 1]), now=0.0)
    published = first.bias()

    second = _controller(path, mode="adaptive", window_tokens=1, update_rate=0.5)
    again = second.bias()
    second.take_assignments(_report([9, 1]), now=0.0)
    second.take_assignments(_report([99, 1], sequence=2), now=0.0)

    assert again == published
    assert second.directory().servers == first.directory().servers
    assert second.epoch == first.epoch
    assert list(second.load(now=0.0).layers[0].counts) == [99, 1]
    assert second.bias().version == published.version + 1
    assert list(second.bias().layers[0].delta) == [-1.0, 1.0]


def test_a_window_closes_after_enough_tokens_and_moves_the_bias_by_the_rate() -> None:
    controller = _controller(mode="adaptive", window_tokens=5, update_rate=0.25)
    version = controller.bias_version

    controller.take_assignments(_report([4, 4]), now=0.0)  # 4 tokens: not yet
    early = controller.bias_version
    controller.take_assignments(_report([8, 4], sequence=2), now=0.0)

    assert early == version
    assert controller.bias_version == version + 1
    assert list(controller.bias().layers[0].delta) == [-0.25, 0.25]


def test_a_window_closes_after_its_time_with_few_tokens() -> None:
    controller = _controller(mode="adaptive", window_tokens=1000, window_s=2.0)
    controller.take_assignments(_report([2, 0]), now=10.0)

    controller.close_windows(11.9)
    early = len(controller.bias().layers)
    controller.close_windows(12.0)

    assert early == 0
    assert len(controller.bias().layers) == 1


def test_the_delta_stays_within_its_bound() -> None:
    controller = _controller(mode="adaptive", window_tokens=1, update_rate=0.4, max_delta=0.5)

    for sequence in range(1, 6):
        controller.take_assignments(_report([9 * sequence, sequence], sequence), now=0.0)

    assert list(controller.bias().layers[0].delta) == [-0.5, 0.5]


def test_frozen_publishes_no_delta_and_freezing_takes_one_back() -> None:
    frozen = _controller(window_tokens=1)
    adaptive = _controller(mode="adaptive", window_tokens=1)

    frozen.take_assignments(_report([9, 1]), now=0.0)
    adaptive.take_assignments(_report([9, 1]), now=0.0)
    moved = adaptive.bias()
    version = adaptive.set_mode("frozen")

    assert len(frozen.bias().layers) == 0
    assert len(moved.layers) == 1
    assert version == moved.version + 1
    assert len(adaptive.bias().layers) == 0
    assert adaptive.bias().mode == "frozen"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="sideways"):
        _controller().set_mode("sideways")


def test_an_older_incarnation_does_not_replace_a_newer_one() -> None:
    controller = _controller()
    controller.announce(_announce(started=5), now=0.0)

    with pytest.raises(SupersededError):
        controller.announce(_announce(started=4), now=0.0)
    controller.announce(_announce(started=6), now=0.0)

    assert controller.directory().servers[0].incarnation == "i6"


def test_a_peer_of_another_checkpoint_or_protocol_is_refused() -> None:
    controller = _controller()
    controller.announce(_announce(), now=0.0)

    with pytest.raises(MismatchError, match="serves checkpoint"):
        controller.check_peer("x", PROTOCOL_VERSION, "another")
    with pytest.raises(MismatchError, match="protocol version"):
        controller.check_peer("x", PROTOCOL_VERSION + 1, "digest")


def test_a_drained_server_is_forgotten_after_a_while_and_a_lost_one_is_not(tmp_path: Path) -> None:
    controller = _controller(tmp_path / "state.sqlite")
    controller.announce(_announce("gone", state="draining"), now=0.0)
    controller.announce(_announce("cut-off"), now=0.0)

    controller.mark_lost(FORGET_AFTER_S)
    soon = {server.server_id: server.state for server in controller.directory().servers}
    before = controller.epoch
    controller.mark_lost(FORGET_AFTER_S + 0.1)
    later = [server.server_id for server in controller.directory().servers]
    restarted = _controller(tmp_path / "state.sqlite")

    assert soon == {"gone": "draining", "cut-off": "lost"}
    assert later == ["cut-off"]
    assert [server.server_id for server in restarted.directory().servers] == ["cut-off"]
    assert restarted.epoch == controller.epoch == before + 1


def test_how_busy_a_server_is_is_no_news_for_routers() -> None:
    controller = _controller()
    controller.announce(_announce(), now=0.0)
    version = controller.directory_version
    busy = _announce()
    busy.load.busy_us = 7

    controller.announce(busy, now=1.0)

    assert controller.directory_version == version
    assert controller.fleet(now=1.0).servers[0].load.busy_us == 7


def test_the_epoch_moves_with_slots_and_not_with_restarts() -> None:
    controller = _controller()

    controller.announce(_announce(), now=0.0)
    first = controller.epoch
    controller.announce(_announce(started=2, state="loading"), now=0.0)
    restarted = controller.epoch
    controller.announce(_announce(started=2, experts=(0, 1, 3)), now=0.0)

    assert restarted == first
    assert controller.epoch == first + 1


def test_a_heartbeat_that_says_nothing_new_changes_no_version() -> None:
    controller = _controller()
    controller.announce(_announce(), now=0.0)
    version = controller.directory_version

    controller.announce(_announce(), now=1.0)

    assert controller.directory_version == version


def test_a_server_not_heard_of_is_lost_until_it_is_heard_again() -> None:
    controller = _controller()
    controller.announce(_announce(), now=0.0)

    controller.mark_lost(LOST_AFTER_S + 0.1)
    lost = controller.directory().servers[0].state
    controller.announce(_announce(), now=LOST_AFTER_S + 1.0)

    assert lost == "lost"
    assert controller.directory().servers[0].state == "ready"


def test_a_routers_end_is_forgotten_only_when_it_is_the_present_one() -> None:
    controller = _controller()
    for incarnation, endpoint in (("old", "h:1"), ("new", "h:2")):
        controller.add_router(
            pb.WatchClusterRequest(router_id="r0", incarnation=incarnation, endpoint=endpoint)
        )

    controller.remove_router("r0", "old", now=0.0)

    assert list(controller.directory().routers) == ["h:2"]


def test_a_broken_watch_that_ends_late_does_not_remove_a_router_that_watches_again() -> None:
    controller = _controller()
    request = pb.WatchClusterRequest(router_id="r0", incarnation="i", endpoint="h:1")
    controller.add_router(request)
    controller.take_assignments(_report([1, 0]), now=0.0)
    controller.add_router(request)  # the first broke off, which nobody has noticed here

    controller.remove_router("r0", "i", now=1.0)
    listed = list(controller.directory().routers)
    controller.remove_router("r0", "i", now=2.0)

    assert listed == ["h:1"]
    assert list(controller.directory().routers) == []


def _weighing(path: Path | str = ":memory:") -> LoadController:
    return LoadController(Store(path), BalanceConfig(), lambda: None, "measured")


def _measured(server: str, pairs_per_s: float, state: str = "ready") -> pb.AnnounceServerRequest:
    announcement = _announce(server, state=state)
    announcement.server.pairs_per_s = pairs_per_s
    return announcement


def _rates(controller: LoadController) -> dict[str, float]:
    shown = {each.server_id: each.rate for each in controller.placement().servers}
    assert shown == {each.server_id: each.rate for each in controller.directory().servers}
    assert shown.items() >= {each.name: each.rate for each in controller.holders()}.items()
    return shown


def test_servers_are_equally_fast_unless_measurements_are_asked_for() -> None:
    controller = _controller()

    controller.announce(_measured("cpu", 1.0), now=0.0)
    controller.announce(_measured("gpu", 100.0), now=0.0)

    assert _rates(controller) == {"cpu": 1.0, "gpu": 1.0}


def test_a_measured_speed_is_published_as_a_placement_of_its_own() -> None:
    controller = _weighing()
    controller.announce(_measured("cpu", 0.0, "loading"), now=0.0)
    controller.announce(_measured("gpu", 100.0), now=0.0)
    before = controller.epoch, controller.directory_version

    controller.announce(_measured("cpu", 25.0), now=1.0)

    assert _rates(controller) == {"cpu": 0.25, "gpu": 1.0}
    assert (controller.epoch, controller.directory_version) == (before[0] + 1, before[1] + 1)


def test_a_server_that_loads_or_is_lost_is_not_compared() -> None:
    controller = _weighing()
    controller.announce(_measured("cpu", 25.0), now=0.0)
    controller.announce(_measured("gpu", 100.0), now=0.0)
    controller.announce(_measured("new", 0.0, "loading"), now=0.0)
    with_new = _rates(controller)

    controller.announce(_measured("cpu", 25.0), now=9.0)
    controller.mark_lost(9.0)

    assert with_new == {"cpu": 0.25, "gpu": 1.0, "new": 1.0}
    assert _rates(controller)["cpu"] == 1.0


def test_measured_speeds_outlive_a_restart_without_a_new_placement(tmp_path: Path) -> None:
    first = _weighing(tmp_path / "state")
    first.announce(_measured("cpu", 25.0), now=0.0)
    first.announce(_measured("gpu", 100.0), now=0.0)
    epoch = first.epoch

    again = _weighing(tmp_path / "state")

    assert _rates(again) == {"cpu": 0.25, "gpu": 1.0}
    assert again.epoch == epoch
    again.announce(_measured("cpu", 25.0), now=1.0)
    assert again.epoch == epoch
