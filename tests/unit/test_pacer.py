"""Work in the background rests when it should, and only then."""

from __future__ import annotations

import pytest

from expert_service.pacer import STEP_S, Pacer
from expertmesh.errors import UnavailableError


class Clock:
    """Time that passes when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rests: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds


def _pacer(clock: Clock, share: float = 0.25, serving: bool = True) -> Pacer:
    return Pacer(share, lambda: serving, clock, clock.sleep)


def test_work_takes_its_share_of_the_time() -> None:
    clock = Clock()
    pause = _pacer(clock, share=0.25)

    for _ in range(1000):
        clock.now += 0.0003
        pause()

    worked = 1000 * 0.0003
    assert abs(worked / clock.now - 0.25) < 0.01


def test_no_step_is_longer_than_a_step_and_a_piece() -> None:
    clock, piece = Clock(), 0.0003
    pause = _pacer(clock, share=0.5)

    for _ in range(100):
        clock.now += piece
        pause()

    assert max(clock.rests) <= STEP_S + piece
    assert min(clock.rests) >= STEP_S


def test_nothing_rests_where_nobody_is_served() -> None:
    clock = Clock()
    pause = _pacer(clock, serving=False)

    for _ in range(100):
        clock.now += 0.01
        pause()

    assert clock.rests == []


def test_a_thread_that_was_kept_from_its_core_rests_longer() -> None:
    clock = Clock()
    pause = _pacer(clock, share=0.25)

    clock.now += 0.05
    pause()

    assert clock.rests == [0.15000000000000002]


def test_work_begins_anew_after_time_without_rest() -> None:
    clock, serving = Clock(), [False]
    pause = Pacer(0.5, lambda: serving[0], clock, clock.sleep)

    clock.now += 10.0
    pause()
    serving[0] = True
    clock.now += 0.002
    pause()

    assert clock.rests == [clock.now - 10.002]


def test_work_that_is_given_up_ends_at_its_next_rest() -> None:
    pause = _pacer(Clock())

    pause.give_up()

    with pytest.raises(UnavailableError):
        pause()
