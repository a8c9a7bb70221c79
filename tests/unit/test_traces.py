"""Traces: what generators promise, and which files are read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from expertmesh.errors import ConfigError
from load_controller.simulator.generators import make_trace
from load_controller.simulator.trace import Trace
from load_controller.simulator.trace_file import parse_trace


def test_a_day_has_half_its_peak_as_mean() -> None:
    trace = make_trace("day:bursts=0,noise=0,peak=1000")

    tokens = trace.tokens_per_s
    assert trace.duration_s == 86_400
    assert tokens.max() == pytest.approx(1000, rel=1e-3)
    assert tokens.mean() == pytest.approx(500, rel=1e-3)
    assert tokens.min() == pytest.approx(200, rel=1e-3)


def test_bursts_are_twice_the_curve_for_five_minutes_and_do_not_touch() -> None:
    quiet = make_trace("day:bursts=0,noise=0").tokens_per_s
    ratio = make_trace("day:bursts=24,noise=0").tokens_per_s / quiet

    burst = ratio > 1.5
    starts = np.flatnonzero(burst[1:] & ~burst[:-1])
    assert ratio[burst] == pytest.approx(2.0)
    assert burst.sum() == 24 * 30  # steps of 10 s
    assert len(starts) == 24


def test_bursts_can_be_kept_within_the_peak() -> None:
    trace = make_trace("day:within_peak=true,noise=0,peak=1000")

    assert trace.tokens_per_s.max() <= 1000
    assert trace.tokens_per_s.mean() > 500


def test_deepseeks_day_has_the_published_mean_and_peak() -> None:
    tokens = make_trace("deepseek:noise=0,peak=278").tokens_per_s

    assert tokens.max() == pytest.approx(278, rel=1e-3)
    assert tokens.mean() == pytest.approx(226.75, rel=1e-3)


def test_popularity_is_zipfs_in_another_order_in_every_layer() -> None:
    trace = make_trace("steady:experts=8,layers=2,exponent=1,top_k=2")

    ranked = np.sort(trace.popularity, axis=2)[0, :, ::-1]
    assert ranked == pytest.approx(np.tile(1 / np.arange(1, 9) / (761 / 280), (2, 1)))
    assert (trace.popularity[0, 0] != trace.popularity[0, 1]).any()


def test_popularity_moves_evenly_from_one_keyframe_to_the_next() -> None:
    shares = np.array([[[0.8, 0.2]], [[0.2, 0.8]]])
    trace = Trace("t", 10.0, np.ones(4), 1, shares, np.array([0.0, 20.0]))

    assert trace.popularity_at(0.0).tolist() == [[0.8, 0.2]]
    assert trace.popularity_at(10.0) == pytest.approx(np.array([[0.5, 0.5]]))
    assert trace.popularity_at(1000.0).tolist() == [[0.2, 0.8]]


def test_the_same_seed_gives_the_same_trace() -> None:
    first, again, other = (make_trace(f"day:seed={seed}") for seed in (1, 1, 2))

    assert (first.tokens_per_s == again.tokens_per_s).all()
    assert (first.popularity == again.popularity).all()
    assert (first.tokens_per_s != other.tokens_per_s).any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("night", "there is no trace 'night': name a file or one of steady, day, deepseek"),
        ("day:size=3", "no parameter 'size'"),
        ("day:peak=high", "peak is 'high', expected a number"),
        ("day:experts=2.5", "experts is '2.5', expected a whole number"),
        ("day:peak=nan", "peak is nan: out of its range"),
        ("day:hours=inf", "hours is inf: out of its range"),
        ("day:mean_share=0.1", "low_share is 0.2: out of its range"),
        ("day:top_k=300", "top_k is 300, expected 1 to 256"),
        ("day:exponent=1", "an expert gets 16.3% of a layer's assignments, .* at most 12.5%"),
        ("day:experts=inf", "experts is 'inf', expected a whole number"),
    ],
)
def test_a_trace_that_cannot_be_made_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trace(name)


# Files.

_JSON = {"format": "expertmesh-trace-1", "step_s": 60, "top_k": 1, "tokens_per_s": [10, 20]}
_ZIPF = {"experts": 4, "layers": 1, "exponent": 1.0}


def test_a_json_file_may_write_the_popularity_out() -> None:
    counts = {"keyframes_s": [0, 60], "shares": [[[3, 1]], [[1, 1]]]}

    trace = parse_trace(json.dumps({**_JSON, "popularity": counts}), "x.json")

    assert trace.tokens_per_s.tolist() == [10, 20]
    assert trace.popularity_at(0).tolist() == [[0.75, 0.25]]
    assert trace.popularity_at(60).tolist() == [[0.5, 0.5]]


def test_a_json_file_may_name_zipfs_law() -> None:
    trace = parse_trace(json.dumps({**_JSON, "zipf": _ZIPF}), "x.json")

    assert sorted(trace.popularity[0, 0]) == pytest.approx([0.12, 0.16, 0.24, 0.48])


def test_a_csv_file_holds_a_curve() -> None:
    text = "# experts=4,layers=3,top_k=2\nat_s,tokens_per_s\n0,5\n30,6\n60,7\n"

    trace = parse_trace(text, "x.csv")

    assert (trace.step_s, trace.top_k, trace.layers, trace.experts) == (30, 2, 3, 4)
    assert trace.tokens_per_s.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x is not a trace"),
        ("{}", "its format is None, expected 'expertmesh-trace-1'"),
        (json.dumps(_JSON), "'zipf' is missing"),
        (json.dumps({**_JSON, "zipf": _ZIPF, "extra": 1}), "unknown: extra"),
        (json.dumps({**_JSON, "zipf": {**_ZIPF, "peak": 1}}), "unknown in zipf: peak"),
        (json.dumps({**_JSON, "zipf": _ZIPF, "tokens_per_s": [-1]}), "negative or non-finite"),
        (json.dumps({**_JSON, "zipf": _ZIPF, "tokens_per_s": []}), "empty|hours"),
        (json.dumps({**_JSON, "zipf": _ZIPF, "top_k": 5}), "top_k is 5, expected 1 to 4"),
        (json.dumps({**_JSON, "popularity": {"shares": [[[0, 0]]]}}), "with a load"),
        (json.dumps({**_JSON, "popularity": {"shares": [[[1, 2]]], "keyframes_s": [5]}}), "ascend"),
        ("", "expected a header"),
        ("at_s,tokens_per_s\n0,1\n", "at least two rows"),
        ("at_s,tokens_per_s\n0,1\n10,1\n15,1\n", "does not rise evenly"),
        ("at_s,tokens_per_s\n0,1\n10,many\n", "could not convert"),
        ("# colour=red\nat_s,tokens_per_s\n0,1\n10,1\n", "no parameter 'colour'"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_trace(text, "x")
