"""The simulator: its queues against theory, its servers' lives, and what a plan does in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from expertmesh.config import AutoscaleConfig
from expertmesh.errors import ConfigError
from load_controller.simulator import Control, FleetSpec, Trace, simulate, smallest_static
from load_controller.simulator.fleet import Fleet
from load_controller.simulator.generators import make_trace
from load_controller.simulator.queues import Delays, Service, Waiting, next_backlog, within
from load_controller.simulator.rows import draw_rows

SPEC = FleetSpec(tokens_per_s=1000.0, slots=16, startup_s=30.0, drain_s=10.0, expert_bytes=1e6)


def _steady(tokens: list[float], experts: int = 32, exponent: float = 0.8, **more: float) -> Trace:
    """A trace with these tokens in steps of 10 s."""
    given = {"experts": experts, "layers": 2, "exponent": exponent, "top_k": 4, **more}
    named = make_trace("steady:" + ",".join(f"{key}={value}" for key, value in given.items()))
    values = np.array(tokens, np.float64)
    return Trace("t", 10.0, values, named.top_k, named.popularity, named.keyframes_s)


# Queues.


@pytest.mark.parametrize("utilization", [0.3, 0.5, 0.8, 0.9])
def test_waits_in_a_queue_are_those_of_theory(utilization: float) -> None:
    """M/M/1: a wait is longer than t with the probability rho exp(-(1 - rho) t / service)."""
    service, rng = Service(0.01), np.random.default_rng(1)
    delays, backlog_s = Delays(), np.zeros(50)
    offered, share = np.full(50, utilization), np.full(50, 1 / 50)
    for _ in range(300):
        before, backlog_s = backlog_s, next_backlog(backlog_s, offered, 10.0, service, rng)
        waiting = Waiting((before + backlog_s) / 2, offered, share)
        delays.add(1.0, within(waiting, 10.0, service, fanout=1))

    expected = np.log(utilization / 0.01) * service.service_s / (1 - utilization)
    assert delays.quantile(0.99) == pytest.approx(expected, rel=0.03)


def test_a_queue_offered_too_much_grows_by_what_does_not_fit_and_drains_by_what_does() -> None:
    service, rng = Service(1e-6), np.random.default_rng(1)
    backlog_s = np.zeros(1)
    for offered in (1.5, 1.5, 0.5):
        backlog_s = next_backlog(backlog_s, np.array([offered]), 10.0, service, rng)

    assert backlog_s[0] == pytest.approx(5.0, abs=0.1)


def test_a_request_waits_for_the_slowest_of_its_parts() -> None:
    waiting = Waiting(np.array([0.0, 1.0]), np.array([1e-9, 1e-9]), np.array([0.5, 0.5]))

    delays = Delays()
    delays.add(1.0, within(waiting, 10.0, Service(1e-6), fanout=3))

    assert delays.quantile(0.12) < 0.01  # an eighth has all three parts at the idle server
    assert delays.quantile(0.13) == pytest.approx(1.0, rel=0.1)


def test_no_requests_have_no_delay() -> None:
    assert Delays().quantile(0.99) == 0.0


# Servers.


def test_a_server_serves_after_its_start_and_is_paid_for_until_it_has_drained() -> None:
    fleet = Fleet(SPEC)
    fleet.start(2, now_s=0.0)

    fleet.advance(29.0)
    assert (fleet.serving, fleet.paid) == ([], 2)
    fleet.advance(30.0)
    assert fleet.serving == [0, 1]
    fleet.drain(1, now_s=40.0, backlog_s=25.0)
    fleet.advance(64.0)
    assert (fleet.serving, fleet.paid) == ([0], 2)
    fleet.advance(65.0)
    assert fleet.paid == 1


def test_servers_that_start_can_be_taken_back() -> None:
    fleet = Fleet(SPEC)
    fleet.start(3, now_s=0.0)

    assert fleet.cancel(5) == 3
    assert fleet.paid == 0


def test_added_servers_help_only_once_they_have_started_and_loaded() -> None:
    trace = _steady([1000.0] * 6 + [4000.0] * 60)
    slow = replace(SPEC, load_bytes_per_s=1e8, model_layers=58)  # 58 slots a step of a second
    scale = AutoscaleConfig(max_replicas=30)

    report = simulate(trace, slow, Control(servers=3, redundant=8, autoscale=scale))

    placed = report.timeline.placed
    first = int(np.argmax(placed > 3))
    asked = int(np.argmax(report.timeline.paid > 3))
    assert first * 10 - asked * 10 >= 30  # startup, then loading
    assert report.timeline.utilization[7] > 1
    assert report.timeline.utilization[-1] < 0.6


def test_a_burst_is_drained_and_its_servers_go_again() -> None:
    trace = _steady([2000.0] * 30 + [4000.0] * 30 + [2000.0] * 60)
    scale = AutoscaleConfig(max_replicas=30)

    report = simulate(trace, SPEC, Control(servers=5, redundant=16, autoscale=scale))

    paid = report.timeline.paid
    assert paid[29] == pytest.approx(2 / 0.45, abs=1)
    assert paid[59] == pytest.approx(4 / 0.45, abs=1)
    assert paid[-1] == pytest.approx(2 / 0.45, abs=1)


def test_quiet_hours_keep_no_redundant_slots() -> None:
    trace = _steady([2000.0] * 30 + [20.0] * 60)
    scale = AutoscaleConfig(min_replicas=4, max_replicas=30)

    report = simulate(trace, SPEC, Control(servers=5, redundant=16, autoscale=scale))

    assert report.timeline.slots[29] > 32
    assert report.timeline.slots[-1] == 32


def test_paid_hours_are_those_of_the_timeline() -> None:
    report = simulate(_steady([1000.0] * 36), SPEC, Control(servers=4, redundant=4))

    assert report.hours == pytest.approx(0.1)
    assert report.server_hours == pytest.approx(0.4)
    assert report.servers == (4, 4.0, 4)
    assert report.redundant_hours == pytest.approx(0.4, rel=0.2)  # but for the first steps


# Plans.


def test_256_experts_and_32_redundant_on_32_servers_come_down_from_1_5_to_0_12() -> None:
    """TensorRT-LLM's published 1.56 -> 0.11 (blog 4, table 1: 32 ranks, 9 slots each)."""
    trace = make_trace("steady:experts=256,layers=2,exponent=0.7,hours=0.1,seed=3,peak=1e5")

    report = simulate(trace, FleetSpec(slots=9), Control(servers=32, redundant=32))

    assert report.maxvio_before >= 1.5
    assert report.maxvio_after <= 0.12
    assert report.maxvio_last <= 0.12  # of the layer that is least even
    assert report.maxvio_dispatched is not None
    assert report.maxvio_dispatched <= 0.12  # also for rows that a router sends where it can


def test_rows_choose_different_experts_as_often_as_the_popularity_says() -> None:
    share = np.array([0.4, 0.3, 0.2, 0.05, 0.05])

    ids = draw_rows(share, 2, 20_000, np.random.default_rng(1))

    assert (ids[:, 0] != ids[:, 1]).all()
    assert np.bincount(ids.ravel()) / ids.size == pytest.approx(share, abs=0.005)


def test_a_drift_is_followed_with_few_slots_loaded_at_a_time() -> None:
    trace = make_trace(
        "steady:experts=64,exponent=0.6,layers=2,hours=2,drift_s=7200,peak=1e5,step_s=20"
    )
    control = Control(servers=8, redundant=16, plan_every_s=600)

    report = simulate(trace, FleetSpec(slots=10), control)
    once = simulate(trace, FleetSpec(slots=10), replace(control, plan_every_s=1e9))

    assert report.maxvio_after < 0.5 * once.maxvio_after
    assert report.plans >= 3
    assert report.loads < report.plans * 2 * 80 / 2  # less than half anew each time


def test_the_same_arguments_give_the_same_report_and_another_seed_another() -> None:
    trace = make_trace("day:hours=0.5,bursts=1,experts=32,top_k=4,peak=4000,step_s=10")
    control = Control(servers=4, autoscale=AutoscaleConfig(max_replicas=60))
    spec = replace(SPEC, tokens_per_s=1000.0)

    first, again, other = (simulate(trace, spec, control, seed) for seed in (1, 1, 2))

    assert first.as_json() == again.as_json()
    assert first.as_json() != other.as_json()


def test_a_thousand_servers_are_planned_and_kept_even() -> None:
    """Ten thousand are in benchmarks/bench_planner.py: they take longer than a unit test may."""
    trace = make_trace("steady:hours=0.02,layers=1,peak=1e7,step_s=10,exponent=0.5")

    report = simulate(trace, FleetSpec(slots=1), Control(servers=1000, redundant=744))

    assert report.servers == (1000, 1000.0, 1000)
    assert report.plans == 1
    assert report.maxvio_last < 0.5 < report.maxvio_before


def test_too_few_servers_for_the_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 servers of 16 slots do not hold 32 experts: 2 do"):
        simulate(_steady([1.0]), SPEC, Control(servers=1))


# Autoscaled and fixed.


def test_the_smallest_fixed_number_is_the_smallest() -> None:
    trace = _steady([3000.0] * 40)
    control = Control(servers=4, redundant=16)

    best = smallest_static(trace, SPEC, control, 0.05, 40)

    fewer = simulate(trace, SPEC, replace(control, servers=best.servers[0] - 1))
    assert best.delay_p99_s <= 0.05 < fewer.delay_p99_s


def test_a_delay_that_no_number_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 servers still wait"):
        smallest_static(_steady([5000.0] * 10), SPEC, Control(servers=5), 1e-4, 5)


@pytest.mark.slow
def test_a_short_day_takes_37_5_percent_fewer_server_hours_than_a_fixed_number() -> None:
    """The shortened form of benchmarks/bench_autoscale.py (EaaS claims 37.5 %)."""
    trace = make_trace("day:hours=8,bursts=8,experts=64,exponent=0.6,layers=1,peak=5e5,step_s=20")
    spec = FleetSpec()
    scale = AutoscaleConfig(max_replicas=120, max_redundant=32)
    control = Control(servers=8, redundant=32, plan_every_s=7200)

    scaled = simulate(trace, spec, replace(control, autoscale=scale))
    as_dear = int(scaled.server_hours / (1 - 0.375) / scaled.hours)
    fixed = simulate(trace, spec, replace(control, servers=as_dear))

    assert fixed.server_hours > 1.5 * scaled.server_hours
    assert fixed.delay_p99_s > scaled.delay_p99_s  # so it takes more servers than these
