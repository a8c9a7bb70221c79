"""When a server is slow, silent, suspected and trusted again: the test is the clock."""

from __future__ import annotations

import pytest

from router_service.standing import HedgeBudget, Standing, expected_s

AFTER_S = 0.25  # RouterConfig.hedge_after_s


def _standing(usual_s: float = 0.01, rows: int = 4) -> Standing:
    """Of a server that has answered once, at 0 s."""
    standing = Standing(AFTER_S, hedge_factor=4.0)
    standing.answered(0.0, -usual_s, rows, AFTER_S)
    return standing


def _suspected(at: float = 1.0) -> Standing:
    standing = _standing()
    standing.suspect(at, 4, AFTER_S)
    return standing


def test_a_server_that_answers_others_is_slow_and_one_that_does_not_is_silent() -> None:
    slow, silent = _standing(), _standing()
    slow.answered(10.2, 10.1, 4, AFTER_S)

    assert slow.silent_at(10.0, 4, AFTER_S) == pytest.approx(10.45)
    assert silent.silent_at(10.0, 4, AFTER_S) == pytest.approx(10.25)


def test_an_answer_just_after_the_asking_does_not_hide_a_hang_for_ever() -> None:
    standing = _standing()
    standing.answered(10.001, 9.99, 4, AFTER_S)

    assert standing.silent_at(10.0, 4, AFTER_S) == pytest.approx(10.001 + AFTER_S)


def test_small_answers_say_nothing_of_large_requests() -> None:
    standing = _standing()
    standing.answered(10.2, 10.1, rows=2, patience_s=AFTER_S)

    assert standing.silent_at(10.0, 2, AFTER_S) == pytest.approx(10.45)
    assert standing.silent_at(10.0, 512, AFTER_S) == pytest.approx(10.25)
    assert standing.answered_since(10.2, 1)
    assert not standing.answered_since(10.0, 512)


def test_one_part_at_a_time_tests_whether_a_server_hangs() -> None:
    standing = _standing()

    assert standing.may_test(1.0)
    assert not standing.may_test(1.2)
    assert standing.may_test(1.25), "the replica of the first one is silent too"


def test_a_server_that_is_silent_altogether_is_left_out_for_any_number_of_rows() -> None:
    standing = _standing()

    standing.suspect(1.0, 512, AFTER_S)

    assert standing.is_suspect(1)
    assert standing.is_suspect(4096)


def test_a_server_that_answers_small_requests_is_left_out_for_large_ones_alone() -> None:
    standing = _standing()
    standing.answered(0.9, 0.89, 2, AFTER_S)

    standing.suspect(1.0, 512, AFTER_S)

    assert standing.suspected
    assert not standing.is_suspect(2)
    assert standing.is_suspect(512)
    assert not standing.probe_due(2.0, 2), "that it answers those is known"
    assert standing.probe_due(2.0, 600)
    assert 256 < standing.probe_rows <= 512, "enough to tell, and no more"


def test_a_suspect_is_probed_by_one_part_at_a_time() -> None:
    standing = _suspected(at=1.0)

    assert not standing.probe_due(1.01, 4)
    assert standing.probe_due(1.1, 4)
    given_up_s = standing.probe(1.1, AFTER_S)
    assert not standing.probe_due(1.1 + 0.9 * given_up_s, 4)
    assert standing.probe_due(1.1 + given_up_s, 4)


def test_a_probe_of_a_silent_server_is_small_for_it_keeps_what_it_is_sent() -> None:
    assert _suspected().probe_rows == 16


def test_a_prompt_answer_brings_a_suspect_back() -> None:
    standing = _suspected(at=1.0)

    assert standing.answered(1.2, 1.1, 4, AFTER_S)
    assert not standing.suspected


def test_an_answer_just_in_time_is_prompt_and_an_ordinary_one_is_no_news() -> None:
    standing = _suspected(at=1.0)

    assert standing.answered(1.5, 1.25, 4, AFTER_S), "0.25 s, and so much patience"
    assert not standing.answered(2.0, 1.9, 4, AFTER_S)


def test_an_answer_to_what_is_small_does_not_bring_back_what_is_large() -> None:
    standing = _standing()
    standing.answered(0.9, 0.89, 2, AFTER_S)
    standing.suspect(1.0, 512, AFTER_S)

    assert not standing.answered(1.2, 1.1, 2, AFTER_S)
    assert standing.is_suspect(512)


def test_a_late_answer_brings_the_next_probe_and_nothing_else() -> None:
    standing = _suspected(at=1.0)
    standing.probe(1.1, AFTER_S)

    assert not standing.answered(1.9, 1.1, 4, AFTER_S)
    assert standing.is_suspect(4)
    assert not standing.probe_due(1.94, 4)
    assert standing.probe_due(1.96, 4), "sooner than the probe would have been given up"


def test_who_hangs_over_and_over_is_left_alone_for_longer_each_time_up_to_a_bound() -> None:
    standing, now, pauses = _standing(), 100.0, []
    for _ in range(8):
        standing.suspect(now, 4, AFTER_S)
        began = now
        while not standing.probe_due(now, 4):
            now += 0.01
        pauses.append(now - began)
        standing.answered(now, now - 0.01, 4, AFTER_S)

    assert pauses[0] < 0.1
    assert pauses == sorted(pauses)
    assert 1.9 < pauses[-1] < 2.1
    now += 60.0
    standing.suspect(now, 4, AFTER_S)
    assert standing.probe_due(now + 0.1, 4), "a minute later it starts anew"


@pytest.mark.parametrize(("trusted_s", "pause_s"), [(10.0, 0.1), (10.1, 0.05)])
def test_who_falls_silent_within_ten_seconds_is_left_alone_twice_as_long(
    trusted_s: float, pause_s: float
) -> None:
    standing = _suspected(at=1.0)
    standing.answered(2.0, 1.9, 4, AFTER_S)  # trusted again

    standing.suspect(2.0 + trusted_s, 4, AFTER_S)

    assert not standing.probe_due(2.0 + trusted_s + 0.9 * pause_s, 4)
    assert standing.probe_due(2.0 + trusted_s + 1.1 * pause_s, 4)


def test_a_hang_does_not_count_as_what_is_usual() -> None:
    standing = _standing(usual_s=0.01)

    standing.answered(60.0, 0.0, 4, AFTER_S)  # continued after a minute

    assert standing.patience_s(4, 0.0) == AFTER_S


def test_patience_follows_a_server_that_has_become_slower() -> None:
    standing = _standing(usual_s=0.01)
    for answer in range(40):
        standing.answered(answer + 1.0, answer, 4, AFTER_S)

    assert standing.patience_s(4, 0.0) > 3.5


def test_what_is_usual_follows_an_answer_by_a_fifth() -> None:
    standing = _standing(usual_s=0.25)

    standing.answered(10.0, 9.5, 4, AFTER_S)

    assert standing.patience_s(4, 0.0) == pytest.approx(4 * (0.25 + (0.5 - 0.25) / 5))


def test_a_size_takes_its_pairs_at_the_measured_speed_or_two_milliseconds_a_row() -> None:
    assert expected_s(1, 4, 0, pairs_per_s=0.5) == 8.0
    assert expected_s(10, 80, 0, pairs_per_s=0.0) == 0.02
    assert expected_s(10, 80, 50_000_000, pairs_per_s=80.0) == 2.0  # a second there and back


def test_an_unknown_size_has_as_long_as_the_servers_measured_speed_makes_likely() -> None:
    rows, pairs, bytes_ = 4096, 4096 * 8, 4096 * 1024 * 2
    standing = Standing(AFTER_S, hedge_factor=4.0)

    measured = standing.patience_s(rows, expected_s(rows, pairs, bytes_, pairs_per_s=1e6))
    unmeasured = standing.patience_s(rows, expected_s(rows, pairs, bytes_, pairs_per_s=0.0))
    few = standing.patience_s(1, expected_s(1, 8, 2048, pairs_per_s=1e5))

    assert measured == pytest.approx(0.25 + 4 * (0.033 + 0.168), rel=0.01)
    assert unmeasured > 8.0
    assert few < 0.26


def test_five_that_hang_cost_together_less_than_twice_the_first() -> None:
    standing = _standing(usual_s=0.001)

    assert sum(standing.patience_s(4, 0.0, tried) for tried in range(5)) < 2 * AFTER_S
    slow = _standing(usual_s=0.1)
    assert slow.patience_s(4, 0.0, tried=3) == pytest.approx(0.4), "it needs its time all the same"


def test_a_new_connection_starts_without_suspicion_and_keeps_what_is_usual() -> None:
    standing = _standing(usual_s=0.5)
    standing.suspect(1.0, 4, AFTER_S)

    standing.renew()

    assert not standing.suspected
    assert standing.patience_s(4, 0.0) > AFTER_S


def test_the_hedge_budget_refills_by_its_share() -> None:
    budget = HedgeBudget(burst=2.0, share=0.5)

    spent = [budget.spend(), budget.spend(), budget.spend()]
    budget.earn(1)
    budget.earn(1)

    assert spent == [True, True, False]
    assert budget.spend()
    assert not budget.spend()


def test_the_hedge_budget_never_holds_more_than_its_burst() -> None:
    budget = HedgeBudget(burst=2.0, share=0.5)

    budget.earn(1000)

    assert [budget.spend(), budget.spend(), budget.spend()] == [True, True, False]


def test_the_sizes_of_which_an_answer_was_seen_are_known() -> None:
    standing = _standing(rows=4)

    assert [rows for rows in range(12) if standing.knows(rows)] == [4, 5, 6, 7]
