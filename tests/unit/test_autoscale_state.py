"""What the autoscaler remembers: through jumping clocks and restarts, and of the period's peak."""

from __future__ import annotations

from dataclasses import replace

import pytest

from load_controller.autoscale import Decision, decide
from tests.autoscale import CONFIG, EVERY_S, Cluster, make_context

# Clocks and restarts.


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0], ids=["back", "forth"])
def test_a_clock_that_jumps_does_not_sit_out_a_delay(step_s: float) -> None:
    cluster = Cluster(running=16, now_s=10_000.0)
    cluster.offer([4.0] * 50)

    cluster.now_s += step_s

    assert cluster.offer([4.0] * 60) == [16] * 60
    assert cluster.offer([4.0] * 2)[-1] == 8


def test_deciding_again_at_the_same_instant_changes_nothing() -> None:
    config = replace(CONFIG, upscale_delay_s=0.0, max_step_up=1)
    first, state = decide(make_context(0, 8, 1.0), config, None)

    again, later = decide(make_context(0, 8, 1.0), config, state)

    assert again == first == Decision(9, 9 * 16 - 64, first.reason)
    assert later == state


def test_a_lost_state_begins_from_what_runs() -> None:
    cluster = Cluster(running=8, config=replace(CONFIG, upscale_delay_s=0.0))
    cluster.offer([8.0] * 3)

    cluster.state = None

    assert cluster.offer([8.0]) == [16]


def test_the_state_does_not_grow() -> None:
    cluster = Cluster(running=8)
    cluster.offer([4.0] * 500)

    assert cluster.state is not None
    assert len(cluster.state.samples) <= 1 + CONFIG.look_back_period_s / EVERY_S


# Room for no more than the period's peak.

PEAK = replace(
    CONFIG, upscale_delay_s=0.0, downscale_delay_s=0.0, peak_utilization=0.8, peak_period_s=3600.0
)
_HOUR = int(3600 / EVERY_S)


def test_at_the_periods_peak_there_is_no_room_for_twice_the_load() -> None:
    cluster = Cluster(running=32, config=PEAK)

    cluster.offer([16.0] * 40 + [4.0] * (_HOUR - 40))
    sizes = cluster.offer([8.0] * 10 + [16.0] * 10)

    assert sizes[9] == 16, "twice 8 is no more than was there in the last hour"
    assert sizes[-1] == 20, "16 / 0.8, and not 16 / 0.5"


def test_until_a_whole_period_is_known_there_is_room_for_twice_the_load() -> None:
    cluster = Cluster(running=8, config=PEAK)

    sizes = cluster.offer([16.0] * (_HOUR // 2))

    assert sizes[-1] == 32


def test_a_load_that_was_never_seen_is_answered_with_the_room_of_a_peak() -> None:
    cluster = Cluster(running=8, config=PEAK)
    cluster.offer([4.0] * (_HOUR + 10))

    sizes = cluster.offer([24.0] * 10)

    assert sizes[-1] == 30


def test_a_peak_is_forgotten_once_it_is_older_than_a_period() -> None:
    cluster = Cluster(running=32, config=PEAK)

    cluster.offer([16.0] * 40 + [8.0] * (_HOUR + 100))

    assert cluster.running == 10, "8 / 0.8: for an hour nothing has needed more"
    assert cluster.state is not None
    assert len(cluster.state.peaks) <= 26


def test_what_a_clock_that_was_put_back_had_said_to_come_is_not_known() -> None:
    cluster = Cluster(running=32, config=PEAK, now_s=10_000.0)
    cluster.offer([16.0] * (_HOUR + 10))
    cluster.now_s = 0.0

    sizes = cluster.offer([16.0] * 10)

    assert sizes[-1] == 32
