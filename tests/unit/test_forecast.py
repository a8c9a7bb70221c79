"""The exponential average of windows, on written-out numbers and as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_controller.forecast import Forecast, observe


def _after(windows: list[list[float]], half_life: float) -> Forecast:
    forecast = None
    for window in windows:
        forecast = observe(forecast, window, half_life)
    assert forecast is not None
    return forecast


def test_the_first_forecast_is_the_first_window() -> None:
    assert _after([[3.0, 5.0]], half_life=7).load.tolist() == pytest.approx([3.0, 5.0])


def test_a_window_one_half_life_old_weighs_half_of_the_newest() -> None:
    forecast = _after([[9.0, 0.0], [0.0, 9.0]], half_life=1)

    assert forecast.load.tolist() == pytest.approx([3.0, 6.0])


def test_half_of_the_weight_is_older_than_the_half_life() -> None:
    forecast = _after([[1.0]] * 200 + [[0.0]] * 5, half_life=5)

    assert forecast.load.tolist() == pytest.approx([0.5])


def test_an_empty_window_keeps_the_proportions() -> None:
    forecast = _after([[4.0, 1.0], [0.0, 0.0]], half_life=2)

    assert forecast.load[0] / forecast.load[1] == pytest.approx(4.0)
    assert forecast.load[0] < 4.0


def test_a_drifting_load_is_followed_sooner_with_a_shorter_half_life() -> None:
    windows = [[10.0, 0.0]] * 20 + [[0.0, 10.0]] * 4

    assert _after(windows, 1).load[1] > _after(windows, 4).load[1] > _after(windows, 16).load[1]


@given(
    st.lists(st.lists(st.floats(0, 1e9), min_size=3, max_size=3), min_size=1, max_size=20),
    st.floats(0.1, 100),
)
def test_a_forecast_lies_between_the_smallest_and_the_largest_window(
    windows: list[list[float]], half_life: float
) -> None:
    load = _after(windows, half_life).load

    slack = 1e-6 * (1 + np.max(windows))
    assert (load >= np.min(windows, 0) - slack).all()
    assert (load <= np.max(windows, 0) + slack).all()


def test_observing_does_not_write_what_was_there() -> None:
    before = _after([[2.0, 4.0]], half_life=3)
    kept = before.sums.copy()

    observe(before, [8.0, 8.0], 3)

    assert before.sums.tolist() == kept.tolist()


@pytest.mark.parametrize("half_life", [0.0, -1.0, float("nan")])
def test_a_half_life_that_is_none_is_refused(half_life: float) -> None:
    with pytest.raises(ValueError, match="half_life is"):
        observe(None, [1.0], half_life)


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_count_that_is_none_is_refused(count: float) -> None:
    with pytest.raises(ValueError, match="negative or non-finite"):
        observe(None, [1.0, count], 2)


def test_a_window_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) follows windows of shape \(2,\)"):
        observe(_after([[1.0, 2.0]], 2), [1.0, 2.0, 3.0], 2)
