"""The autoscaler: when servers come and go, and how many."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.config import AutoscaleConfig
from expertmesh.errors import ConfigError
from load_controller.autoscale import decide, least_servers
from tests.autoscale import CONFIG, EVERY_S, Cluster, make_context

# Up and down.


def test_servers_are_added_once_more_have_been_wanted_for_the_delay() -> None:
    cluster = Cluster(running=8)

    sizes = cluster.offer([8.0] * 7)  # 0, 5, ... 30 s

    assert sizes == [8, 8, 8, 8, 8, 8, 16]


def test_servers_go_once_fewer_have_been_wanted_for_the_delay() -> None:
    cluster = Cluster(running=16)

    sizes = cluster.offer([4.0] * 61)  # until 300 s

    assert sizes[:60] == [16] * 60
    assert sizes[60] == 8


def test_load_that_swings_within_the_delay_changes_nothing() -> None:
    cluster = Cluster(running=16)

    sizes = cluster.offer(([2.0] * 12 + [8.0] * 12) * 20)  # a minute low, a minute as sized for

    assert set(sizes) == {16}


def test_a_spike_shorter_than_the_delay_adds_nothing() -> None:
    cluster = Cluster(running=8)

    sizes = cluster.offer([4.0] * 6 + [12.0] * 3 + [4.0] * 20)

    assert set(sizes) == {8}


def test_what_went_highest_within_the_delay_is_what_stays() -> None:
    cluster = Cluster(running=16)

    sizes = cluster.offer([2.0] * 20 + [6.0] * 4 + [2.0] * 40)

    assert sizes[-1] == 12  # 6 servers' worth of work, not 2


def test_a_burst_is_followed_up_at_once_without_a_delay_and_down_after_it() -> None:
    cluster = Cluster(running=8, config=replace(CONFIG, upscale_delay_s=0.0))

    sizes = cluster.offer([4.0] * 4 + [8.0] * 60 + [4.0] * 70)

    assert sizes[3] == 8
    assert sizes[5] == 16
    assert sizes[-1] == 8
    assert sum(a != b for a, b in pairwise(sizes)) == 3  # up by way of the look-back's mean


def test_noise_within_the_tolerance_changes_nothing() -> None:
    cluster = Cluster(running=20, config=replace(CONFIG, upscale_delay_s=0, downscale_delay_s=0))

    sizes = cluster.offer([10.8, 9.2, 10.5, 9.5] * 20)

    assert set(sizes) == {20}


def test_servers_that_start_are_not_asked_for_twice() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0)
    decision, state = decide(make_context(0, 8, 1.0), config, None)
    assert decision.replicas == 16

    for at in range(1, 10):
        context = make_context(at * EVERY_S, 8, 1.0, starting=8)
        decision, state = decide(context, config, state)

    assert decision.replicas == 16


def test_the_reason_says_in_words_what_was_measured() -> None:
    decision, _ = decide(make_context(0, 8, 0.75), CONFIG, None)

    assert decision.reason == "6.00 servers' worth of work at 8, 0.5 of each wanted"


# Factors and steps.


def test_a_factor_goes_only_part_of_the_way_at_a_time() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0, upscaling_factor=0.5)

    assert Cluster(8, config).offer([8.0] * 4) == [12, 14, 15, 15]  # and then within the tolerance


def test_a_step_is_never_larger_than_its_bound() -> None:
    config = replace(
        CONFIG, upscale_delay_s=0.0, downscale_delay_s=0.0, max_step_up=3, max_step_down=2
    )
    cluster = Cluster(8, config)

    assert cluster.offer([16.0] * 3) == [11, 14, 17]
    assert cluster.offer([2.0] * 5) == [17, 15, 13, 11, 9]


def test_each_bounded_step_waits_for_its_own_delay() -> None:
    cluster = Cluster(8, replace(CONFIG, max_step_up=2, max_step_down=1, downscale_delay_s=20.0))

    assert cluster.offer([16.0] * 13) == [8] * 6 + [10] * 6 + [12]
    assert cluster.offer([3.0] * 10) == [12] * 5 + [11] * 4 + [10]


# Bounds.


def test_there_are_never_fewer_servers_than_hold_every_expert() -> None:
    cluster = Cluster(running=8)

    sizes = cluster.offer([0.0] * 200)

    assert sizes[-1] == 4  # 64 experts, 16 slots


def test_redundant_slots_that_must_stay_count_for_the_least() -> None:
    assert least_servers(64, 16, CONFIG) == 4
    assert least_servers(64, 16, replace(CONFIG, min_redundant=1)) == 5
    assert least_servers(64, 16, replace(CONFIG, min_replicas=7)) == 7


def test_there_are_never_more_servers_than_allowed() -> None:
    config = replace(CONFIG, max_replicas=12, upscale_delay_s=0.0)

    assert Cluster(8, config).offer([100.0] * 10)[-1] == 12


def test_a_changed_bound_holds_at_once() -> None:
    cluster = Cluster(running=16)
    cluster.offer([8.0])

    cluster.config = replace(CONFIG, max_replicas=10)
    assert cluster.offer([8.0]) == [10]
    cluster.config = replace(CONFIG, min_replicas=20)
    assert cluster.offer([8.0]) == [20]


def test_bounds_that_hold_no_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="64 experts and 0 redundant slots need 4 servers of 16"):
        decide(make_context(0, 2, 0.5), replace(CONFIG, max_replicas=3), None)


def test_a_new_cluster_begins_with_the_fewest_and_a_running_one_as_it_is() -> None:
    config = replace(CONFIG, min_replicas=6)

    assert decide(make_context(0, 0, None), config, None)[0].replicas == 6
    assert decide(make_context(0, 9, 0.5, starting=2), config, None)[0].replicas == 11


# Redundant slots.


def test_copies_take_the_room_there_is_up_to_their_bound() -> None:
    assert decide(make_context(0, 8, 0.5), CONFIG, None)[0].redundant == 8 * 16 - 64
    bounded = replace(CONFIG, max_redundant=32)
    assert decide(make_context(0, 8, 0.5), bounded, None)[0].redundant == 32


def test_quiet_hours_need_no_copies() -> None:
    config = replace(CONFIG, min_replicas=8)
    cluster = Cluster(8, config)
    cluster.offer([0.2] * 61)

    quiet, state = decide(make_context(cluster.now_s, 8, 0.02), config, cluster.state)
    assert (quiet.replicas, quiet.redundant) == (8, 0)

    for at in range(1, 10):
        busy, state = decide(make_context(cluster.now_s + at * EVERY_S, 8, 0.5), config, state)
    assert busy.redundant == 64


def test_copies_that_must_stay_stay_in_quiet_hours() -> None:
    config = replace(CONFIG, min_redundant=5)
    cluster = Cluster(8, config)
    cluster.offer([0.2] * 200)

    decision, _ = decide(make_context(cluster.now_s, 5, 0.02), config, cluster.state)

    assert (decision.replicas, decision.redundant) == (5, 5)


# What always holds, on drawn loads.


_LOADS = st.lists(
    st.one_of(st.none(), st.floats(0, 200), st.sampled_from([0.0, 10.0])), min_size=1, max_size=80
)


@settings(max_examples=150, deadline=None)
@given(_LOADS, st.integers(0, 30), st.integers(0, 100), st.booleans())
def test_every_decision_keeps_every_bound(
    loads: list[float | None], up_s: int, down_s: int, steps: bool
) -> None:
    config = replace(
        CONFIG,
        min_replicas=2,
        max_replicas=40,
        upscale_delay_s=up_s,
        downscale_delay_s=down_s,
        max_step_up=5 if steps else None,
        max_step_down=2 if steps else None,
        max_redundant=48,
    )
    cluster = Cluster(8, config)
    before = 8
    for load in loads:
        (size,) = cluster.offer([load])
        assert 4 <= size <= 40
        if steps:
            assert -2 <= size - before <= 5
        before = size
        assert cluster.state is not None
        again = decide(make_context(cluster.state.at_s, size, 0.0), config, cluster.state)
        assert 0 <= again[0].redundant <= min(48, size * 16 - 64)


@settings(max_examples=50, deadline=None)
@given(_LOADS)
def test_a_steady_load_settles_and_then_nothing_changes(loads: list[float | None]) -> None:
    config = replace(CONFIG, downscale_delay_s=60, max_step_up=7, downscaling_factor=0.5)
    cluster = Cluster(8, config)
    cluster.offer(loads)

    sizes = cluster.offer([10.0] * 200)

    assert len(set(sizes[-50:])) == 1
    assert 18 <= sizes[-1] <= 22  # 10 / 0.5, and the tolerance


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"min_replicas": 0}, "min_replicas is 0, expected >= 1"),
        ({"min_replicas": 5, "max_replicas": 4}, "max_replicas is 4, expected >= 5"),
        ({"target_ongoing_requests": 0.0}, "target_ongoing_requests is 0.0"),
        ({"target_utilization": 1.5}, "target_utilization is 1.5, expected within"),
        ({"upscale_delay_s": -1.0}, "upscale_delay_s is -1.0"),
        ({"downscale_delay_s": float("nan")}, "downscale_delay_s is nan"),
        ({"upscaling_factor": 0.0}, "upscaling_factor is 0.0"),
        ({"max_step_down": 0}, "max_step_down is 0, expected >= 1"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
        ({"max_redundant": 1, "min_redundant": 2}, "max_redundant is 1, expected >= 2"),
        ({"quiet_utilization": 0.6}, "quiet_utilization is 0.6"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(bad: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoscaleConfig(**bad)  # type: ignore[arg-type]
