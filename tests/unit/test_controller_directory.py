"""The load controller's routers and servers: who is there, fits, and how fast they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expertmesh.config import BalanceConfig
from expertmesh.errors import InvalidRequestError, MismatchError, SupersededError
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.v1 import control_pb2 as pb
from load_controller.controller import FORGET_AFTER_S, LOST_AFTER_S, LoadController
from load_controller.store import Store
from tests.controller import LAYER, make_announcement, make_controller, make_report


def test_routers_are_listed_with_the_versions_that_they_use() -> None:
    controller = make_controller()
    controller.add_router(pb.WatchClusterRequest(router_id="r0", incarnation="i", endpoint="h:1"))
    silent = list(controller.load(now=0.0).routers)
    report = make_report([1, 1])
    report.bias_version, report.epoch = 1, 4
    controller.take_assignments(report, now=0.0)

    assert silent == [pb.RouterState(router_id="r0", endpoint="h:1", away_s=-1.0)]
    assert list(controller.load(now=0.0).routers) == [
        pb.RouterState(router_id="r0", endpoint="h:1", bias_version=1, epoch=4, away_s=-1.0)
    ]


def test_a_router_that_went_without_a_word_is_missed_and_one_that_took_leave_is_not() -> None:
    controller = make_controller()
    for name in ("lost", "left", "late"):
        controller.add_router(pb.WatchClusterRequest(router_id=name, incarnation="i"))
    goodbye = {name: make_report([1, 1], source=name) for name in ("left", "late")}
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
    first = make_controller(tmp_path / "state.sqlite")
    first.add_router(pb.WatchClusterRequest(router_id="r0", incarnation="i"))
    first.remove_router("r0", "i", now=0.0)

    second = make_controller(tmp_path / "state.sqlite")

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
        make_controller().add_router(pb.WatchClusterRequest(router_id="r0", gates=[gate]))


def test_an_older_incarnation_does_not_replace_a_newer_one() -> None:
    controller = make_controller()
    controller.announce(make_announcement(started=5), now=0.0)

    with pytest.raises(SupersededError):
        controller.announce(make_announcement(started=4), now=0.0)
    controller.announce(make_announcement(started=6), now=0.0)

    assert controller.directory().servers[0].incarnation == "i6"


def test_a_peer_of_another_checkpoint_or_protocol_is_refused() -> None:
    controller = make_controller()
    controller.announce(make_announcement(), now=0.0)

    with pytest.raises(MismatchError, match="serves checkpoint"):
        controller.check_peer("x", PROTOCOL_VERSION, "another")
    with pytest.raises(MismatchError, match="protocol version"):
        controller.check_peer("x", PROTOCOL_VERSION + 1, "digest")


def test_a_drained_server_is_forgotten_after_a_while_and_a_lost_one_is_not(tmp_path: Path) -> None:
    controller = make_controller(tmp_path / "state.sqlite")
    controller.announce(make_announcement("gone", state="draining"), now=0.0)
    controller.announce(make_announcement("cut-off"), now=0.0)

    controller.mark_lost(FORGET_AFTER_S)
    soon = {server.server_id: server.state for server in controller.directory().servers}
    before = controller.epoch
    controller.mark_lost(FORGET_AFTER_S + 0.1)
    later = [server.server_id for server in controller.directory().servers]
    restarted = make_controller(tmp_path / "state.sqlite")

    assert soon == {"gone": "draining", "cut-off": "lost"}
    assert later == ["cut-off"]
    assert [server.server_id for server in restarted.directory().servers] == ["cut-off"]
    assert restarted.epoch == controller.epoch == before + 1


def test_how_busy_a_server_is_is_no_news_for_routers() -> None:
    controller = make_controller()
    controller.announce(make_announcement(), now=0.0)
    version = controller.directory_version
    busy = make_announcement()
    busy.load.busy_us = 7

    controller.announce(busy, now=1.0)

    assert controller.directory_version == version
    assert controller.fleet(now=1.0).servers[0].load.busy_us == 7


def test_the_epoch_moves_with_slots_and_not_with_restarts() -> None:
    controller = make_controller()

    controller.announce(make_announcement(), now=0.0)
    first = controller.epoch
    controller.announce(make_announcement(started=2, state="loading"), now=0.0)
    restarted = controller.epoch
    controller.announce(make_announcement(started=2, experts=(0, 1, 3)), now=0.0)

    assert restarted == first
    assert controller.epoch == first + 1


def test_a_heartbeat_that_says_nothing_new_changes_no_version() -> None:
    controller = make_controller()
    controller.announce(make_announcement(), now=0.0)
    version = controller.directory_version

    controller.announce(make_announcement(), now=1.0)

    assert controller.directory_version == version


def test_a_server_not_heard_of_is_lost_until_it_is_heard_again() -> None:
    controller = make_controller()
    controller.announce(make_announcement(), now=0.0)

    controller.mark_lost(LOST_AFTER_S + 0.1)
    lost = controller.directory().servers[0].state
    controller.announce(make_announcement(), now=LOST_AFTER_S + 1.0)

    assert lost == "lost"
    assert controller.directory().servers[0].state == "ready"


def test_a_routers_end_is_forgotten_only_when_it_is_the_present_one() -> None:
    controller = make_controller()
    for incarnation, endpoint in (("old", "h:1"), ("new", "h:2")):
        controller.add_router(
            pb.WatchClusterRequest(router_id="r0", incarnation=incarnation, endpoint=endpoint)
        )

    controller.remove_router("r0", "old", now=0.0)

    assert list(controller.directory().routers) == ["h:2"]


def test_a_broken_watch_that_ends_late_does_not_remove_a_router_that_watches_again() -> None:
    controller = make_controller()
    request = pb.WatchClusterRequest(router_id="r0", incarnation="i", endpoint="h:1")
    controller.add_router(request)
    controller.take_assignments(make_report([1, 0]), now=0.0)
    controller.add_router(request)  # the first broke off, which nobody has noticed here

    controller.remove_router("r0", "i", now=1.0)
    listed = list(controller.directory().routers)
    controller.remove_router("r0", "i", now=2.0)

    assert listed == ["h:1"]
    assert list(controller.directory().routers) == []


def _weighing(path: Path | str = ":memory:") -> LoadController:
    return LoadController(Store(path), BalanceConfig(), lambda: None, "measured")


def _measured(server: str, pairs_per_s: float, state: str = "ready") -> pb.AnnounceServerRequest:
    announcement = make_announcement(server, state=state)
    announcement.server.pairs_per_s = pairs_per_s
    return announcement


def _rates(controller: LoadController) -> dict[str, float]:
    shown = {each.server_id: each.rate for each in controller.placement().servers}
    assert shown == {each.server_id: each.rate for each in controller.directory().servers}
    assert shown.items() >= {each.name: each.rate for each in controller.holders()}.items()
    return shown


def test_servers_are_equally_fast_unless_measurements_are_asked_for() -> None:
    controller = make_controller()

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
