"""One owner at a time adds and removes servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.errors import InvalidRequestError, LeaseLostError
from load_controller.scaling import RETURN_S, Bounds, Scaling
from load_controller.store import Store


def _scaling(path: Path | str = ":memory:") -> Scaling:
    return Scaling(Store(path))


def test_a_second_owner_is_refused_and_an_old_one_fenced_off() -> None:
    scaling = _scaling()
    first = scaling.take("a", 10.0, now=0.0)

    with pytest.raises(LeaseLostError, match="a adds and removes servers here"):
        scaling.take("b", 10.0, now=9.0)
    second = scaling.take("b", 10.0, now=10.0)

    assert second == first + 1
    scaling.check(second)
    scaling.check(0)
    with pytest.raises(LeaseLostError, match="another owner has taken the lease"):
        scaling.check(first)
    with pytest.raises(LeaseLostError, match="b adds"):
        scaling.take("a", 10.0, now=11.0)


def test_an_owner_keeps_its_number_as_long_as_it_asks_in_time() -> None:
    scaling = _scaling()

    numbers = [scaling.take("a", 10.0, now=now) for now in (0.0, 9.0, 18.0)]

    assert numbers == [1, 1, 1]
    assert scaling.holder(now=27.0) == "a"
    assert scaling.holder(now=28.0) == ""


def test_a_lease_that_is_given_back_is_free_at_once() -> None:
    scaling = _scaling()
    scaling.take("a", 10.0, now=0.0)

    scaling.take("a", 0.0, now=1.0)
    scaling.take("b", 0.0, now=1.0)

    assert scaling.holder(now=1.0) == ""
    assert scaling.take("c", 10.0, now=1.0) == 2


def test_after_a_restart_the_last_owner_has_time_to_come_back(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    fence = _scaling(path).take("a", 10.0, now=0.0)

    restarted = _scaling(path)
    with pytest.raises(LeaseLostError):
        restarted.take("b", 10.0, now=100.0)
    again = restarted.take("a", 10.0, now=101.0)
    other = _scaling(path)
    other.holder(now=200.0)
    taken = other.take("b", 10.0, now=200.0 + RETURN_S)

    assert again == fence
    assert taken == fence + 1


def test_bounds_by_hand_are_kept_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    _scaling(path).set_bounds(Bounds(2, 5))

    assert _scaling(path).bounds == Bounds(2, 5)


@pytest.mark.parametrize(("least", "most"), [(-1, 0), (0, -1), (3, 2)])
def test_bounds_that_cannot_be_are_refused(least: int, most: int) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be"):
        _scaling().set_bounds(Bounds(least, most))


@pytest.mark.parametrize(("owner", "seconds"), [("", 1.0), ("a", -1.0), ("a", float("nan"))])
def test_a_lease_that_cannot_be_is_refused(owner: str, seconds: float) -> None:
    with pytest.raises(InvalidRequestError):
        _scaling().take(owner, seconds, now=0.0)
