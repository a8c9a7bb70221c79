"""How much time a request has left, at a written-out instant."""

from __future__ import annotations

import math
import time

import pytest

from expertmesh.errors import DeadlineError
from expertmesh.rpc.deadline import Deadline

NOW = 100.0


@pytest.fixture(autouse=True)
def the_clock_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: NOW)


def test_a_deadline_is_an_instant_and_none_is_never() -> None:
    assert Deadline.after(2.5) == Deadline(102.5)
    assert Deadline.after(None) == Deadline(math.inf)


@pytest.mark.parametrize(
    ("at", "remaining", "timeout", "timeout_us"),
    [
        (102.5, 2.5, 2.5, 2_500_000),
        (NOW, 0.0, 0.0, 1),
        (99.0, -1.0, 0.0, 1),
        (NOW + 2**-20, 2**-20, 2**-20, 1),
        (math.inf, math.inf, None, 0),
        (1e300, 1e300, 1e300, 10**18),
    ],
    ids=["to come", "now", "past", "within a microsecond", "never", "more than 64 bits hold"],
)
def test_time_left_is_never_negative_on_the_wire_and_never_0_unless_unbounded(
    at: float, remaining: float, timeout: float | None, timeout_us: int
) -> None:
    deadline = Deadline(at)

    assert deadline.remaining == remaining
    assert deadline.timeout == timeout
    assert deadline.timeout_us == timeout_us


def test_a_deadline_has_passed_from_its_instant_on() -> None:
    Deadline(NOW + 2**-20).check()
    Deadline(math.inf).check()

    for at in (NOW, 99.0):
        with pytest.raises(DeadlineError, match="allow more time"):
            Deadline(at).check()
