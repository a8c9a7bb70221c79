"""Which servers count as equally fast, and how much slower others are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load_controller.rates import ALIKE, relative_rates


def test_servers_that_noise_may_tell_apart_are_alike() -> None:
    assert relative_rates({"a": 100.0, "b": 140.0, "c": 120.0}) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_another_kind_counts_with_what_it_reaches_of_the_fastest() -> None:
    rates = relative_rates({"gpu0": 1000.0, "gpu1": 810.0, "cpu0": 80.0, "cpu1": 100.0})

    assert rates["gpu0"] == rates["gpu1"] == 1.0
    assert rates["cpu0"] == rates["cpu1"] == pytest.approx((8000 / 810000) ** 0.5, rel=0.05)


@pytest.mark.parametrize("speeds", [{}, {"a": 100.0, "b": 0.0}], ids=["nobody", "one unknown"])
def test_where_somebody_has_not_measured_all_are_equal(speeds: dict[str, float]) -> None:
    assert relative_rates(speeds) == {}


@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=12))
def test_who_is_faster_never_gets_less_and_a_kind_spans_little(speeds: list[float]) -> None:
    named = {f"s{index}": speed for index, speed in enumerate(speeds)}

    rates = relative_rates(named)

    assert rates.keys() == named.keys()
    assert max(rates.values()) == 1.0
    for a, b in itertools.combinations(named, 2):
        if named[a] <= named[b]:
            assert rates[a] <= rates[b]
        if rates[a] == rates[b]:  # or two digits do not tell their kinds apart
            low, high = sorted((named[a], named[b]))
            assert high <= low * ALIKE**2 * 1.1
