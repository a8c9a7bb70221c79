"""What the autoscaler makes of queues, and of what is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertmesh.errors import ConfigError
from load_controller.autoscale import Sample, State, decide
from tests.autoscale import CONFIG, EVERY_S, Cluster, make_context

# Queues.


def test_a_long_queue_adds_servers_though_the_work_does_not() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0)

    decision, _ = decide(make_context(0, 8, 0.45, queue_delay_s=0.15), config, None)

    assert decision.replicas == 16  # 1 - 0.55 * 1.5 = 0.175 busy would be as wanted: twice at most
    assert decision.reason == "requests wait 0.15 s, 0.1 wanted"


def test_a_queue_adds_as_many_as_shorten_it_to_what_is_wanted() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0, target_utilization=0.9)

    decision, _ = decide(make_context(0, 8, 0.75, queue_delay_s=0.2), config, None)

    assert decision.replicas == 12  # waits go as 1 / (1 - u): 0.5 busy halves them


def test_two_targets_that_disagree_do_not_add_and_drain_in_turn() -> None:
    """Work alone wants 8 servers, but their queues would be too long."""
    config = replace(CONFIG, upscale_delay_s=0.0, downscale_delay_s=30.0, target_utilization=0.85)
    state, size, sizes = None, 8, []
    for at in range(200):
        busy = 6.8 / size
        waits = 0.04 * busy / (1 - busy)
        context = make_context(at * EVERY_S, size, busy, queue_delay_s=waits)
        decision, state = decide(context, config, state)
        size = decision.replicas
        sizes.append(size)

    assert set(sizes[20:]) == {10}  # at 0.68 busy they wait 0.085 s


def test_a_queue_alone_at_most_doubles_the_servers() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0)

    decision, _ = decide(make_context(0, 8, 0.45, ongoing=1000.0), config, None)

    assert decision.replicas == 16


def test_a_queue_asks_for_nothing_until_the_work_has_what_it_asks_for() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0)

    decision, _ = decide(make_context(0, 8, 0.6, ongoing=1000.0), config, None)

    assert decision.replicas == 10  # 8 * 0.6 / 0.5, not 16


def test_a_queue_that_drains_adds_nothing_and_lets_nothing_go() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0, downscale_delay_s=0.0)
    state = None
    decisions = []
    for at, waits in enumerate([8.0, 6.0, 4.0, 2.0, 1.0]):
        context = make_context(at * 5.0, 16, 0.2, queue_delay_s=waits, ongoing=10 * waits)
        if state is None:
            state = State(replicas=16, at_s=-5.0, reason="")
            _, state = decide(replace(context, now_s=-1.0), config, state)
        decision, state = decide(context, config, state)
        decisions.append(decision.replicas)

    assert decisions[0] == decisions[-1]
    assert set(decisions[1:]) == {decisions[0]}


def test_a_queue_is_heard_when_the_work_is_not_known() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0)

    decision, _ = decide(make_context(0, 8, None, ongoing=4.0), config, None)

    assert decision.replicas == 16


# What is not known is not zero.


def test_without_measurements_nothing_changes() -> None:
    cluster = Cluster(running=16)

    assert set(cluster.offer([None] * 200)) == {16}


def test_a_gap_in_the_measurements_starts_the_wait_to_drain_anew() -> None:
    cluster = Cluster(running=16)

    sizes = cluster.offer([4.0] * 50 + [None] * 3 + [4.0] * 59)

    assert set(sizes) == {16}
    assert cluster.offer([4.0] * 4)[-1] == 8


def test_a_missing_sample_between_known_ones_is_not_a_zero() -> None:
    cluster = Cluster(running=8, config=replace(CONFIG, downscale_delay_s=0.0))

    assert set(cluster.offer([4.0, None] * 20)) == {8}


def test_servers_that_do_not_report_stop_others_from_going() -> None:
    state = None
    for at in range(100):
        context = make_context(at * EVERY_S, 16, 0.1, reporting=15)
        decision, state = decide(context, CONFIG, state)

    assert decision.replicas == 16
    assert decision.reason == "some servers have not reported their load"


def test_servers_that_do_not_report_are_taken_to_be_as_busy_as_the_others() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0)

    decision, _ = decide(make_context(0, 16, 0.75, reporting=4), config, None)

    assert decision.replicas == 24


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_measurement_that_cannot_be_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="expected a number >= 0"):
        Sample(utilization=value)
