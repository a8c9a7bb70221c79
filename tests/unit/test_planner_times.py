"""How long a plan of a whole model takes."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from load_controller.planner import plan_placement
from tests.plans import alike_servers, zipf

_TIMED = 5
_YARD_S = 0.092  # the least that the yardstick took on an EPYC without AVX-512, in three runs


def _yardstick_s() -> float:
    """Processor time of fixed work like a planner's: hosts slow down by half from second to second,
    and it with them."""
    values = np.random.default_rng(0).random((58 * 32, 256))
    started = time.process_time()
    for _ in range(10):
        np.sort(values, axis=1)
        np.argsort(-values[:256], axis=1, kind="stable")
        values.sum(1)
    sum(n * n for n in range(300_000))
    return time.process_time() - started


@pytest.mark.parametrize(
    ("layers", "servers", "redundant", "bound_s"), [(58, 32, 32, 0.5), (61, 320, 64, 3.0)]
)
@pytest.mark.slow
def test_a_whole_model_is_planned_within_its_time(
    layers: int, servers: int, redundant: int, bound_s: float
) -> None:
    """The least processor time of a few runs: what others do on the machine adds to it, through the
    caches they share. benchmarks/bench_planner.py has the time on the clock."""
    load = zipf(layers, 256, 1.0, seed=1)
    drift = load * np.random.default_rng(2).lognormal(0, 0.2, load.shape)

    # A full collection walks what every other test has left: with half a million objects 0.24 s.
    gc.collect()
    gc.freeze()
    try:
        first_s, again_s = [], []
        for _ in range(_TIMED):
            slowness = _yardstick_s() / _YARD_S
            started = time.process_time()
            plan = plan_placement(load, alike_servers(servers), redundant)
            planned = time.process_time()
            plan_placement(drift, alike_servers(servers), redundant, plan.placement)
            first_s.append((planned - started) / slowness)
            again_s.append((time.process_time() - planned) / slowness)
    finally:
        gc.unfreeze()

    assert min(first_s) <= bound_s
    assert min(again_s) <= bound_s
