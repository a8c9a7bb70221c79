"""Windows to deltas: modes, schedule, decay, and what the divergence ceiling does to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertmesh.config import BalanceConfig
from expertmesh.model import GateSpec
from load_controller.balancer import Balancer
from load_controller.divergence import UNMEASURED, Gate, Share

LAYER = 3
GATE = Gate(GateSpec(score="sigmoid", top_k=1), torch.zeros(2))


def _balancer(**settings: object) -> Balancer:
    config = BalanceConfig(**{"mode": "adaptive", "window_tokens": 4, **settings})  # type: ignore[arg-type]
    return Balancer(config, config.mode, {LAYER: GATE})


def _close(balancer: Balancer, counts: tuple[int, int] = (4, 0), now: float = 0.0) -> bool:
    balancer.count({LAYER: np.array(counts)}, {LAYER: 1}, now)
    return balancer.close_due(now)


def _delta(balancer: Balancer) -> list[float]:
    return balancer.layers[LAYER].delta.tolist()


def _gaps(low: float, high: float, rows: int = 1000) -> torch.Tensor:
    """Rows whose first expert leads by gaps spread evenly from `low` to `high`."""
    gaps = torch.linspace(low, high, rows)
    return torch.stack((0.5 + gaps, torch.full_like(gaps, 0.5)), 1)


def test_layers_move_each_by_its_own_counts() -> None:
    balancer = _balancer(update_rate=0.25)
    news = {1: np.array([4, 0]), 2: np.array([1, 3]), 3: np.array([1, 1])}
    balancer.count(news, {1: 1, 2: 1, 3: 1}, now=0.0)

    balancer.close_due(now=0.0)

    assert balancer.layers[1].delta.tolist() == [-0.25, 0.25]
    assert balancer.layers[2].delta.tolist() == [0.25, -0.25]
    assert balancer.layers[3].delta.tolist() == [0.0, 0.0], "its window is still open"


def test_frozen_measures_its_windows_and_moves_nothing() -> None:
    balancer = _balancer(mode="frozen")

    changed = _close(balancer)

    assert not changed
    assert balancer.layers[LAYER].violation == 1.0
    assert _delta(balancer) == [0.0, 0.0]


def test_off_closes_no_window() -> None:
    balancer = _balancer(mode="off")

    _close(balancer)

    assert balancer.closed_windows == 0
    assert balancer.layers == {}


def test_the_delta_decays_in_each_window() -> None:
    balancer = _balancer(update_rate=0.5, decay=0.5)
    _close(balancer)
    _close(balancer, counts=(2, 2))

    assert _delta(balancer) == [-0.25, 0.25]


def test_the_rate_follows_its_schedule_and_a_reset_begins_it_anew() -> None:
    balancer = _balancer(update_rate=0.4, schedule="inverse", schedule_windows=1)
    steps = []
    for _ in range(3):
        before = balancer.layers[LAYER].delta[1] if balancer.layers else 0.0
        _close(balancer)
        steps.append(float(balancer.layers[LAYER].delta[1] - before))
    balancer.set_mode("adaptive", reset=True)
    _close(balancer)

    assert steps == pytest.approx([0.4, 0.2, 0.4 / 3])
    assert _delta(balancer) == pytest.approx([-0.4, 0.4])


def test_without_a_sample_a_ceiling_lets_nothing_pass() -> None:
    balancer = _balancer(update_rate=0.05, divergence_ceiling=0.1)

    changed = _close(balancer)

    assert not changed
    assert _delta(balancer) == [0.0, 0.0]


def test_a_candidate_is_judged_on_held_rows_before_it_is_published() -> None:
    balancer = _balancer(update_rate=0.04, divergence_ceiling=0.1)
    balancer.sample("r0", LAYER, _gaps(0.0, 1.0), UNMEASURED, now=0.0)

    for _ in range(2):  # the gap closes by 0.08, and would by 0.16
        _close(balancer)

    assert _delta(balancer) == pytest.approx([-0.04, 0.04])
    assert balancer.layers[LAYER].halvings == 1
    assert balancer.layers[LAYER].withdrawals == 0


def test_a_candidate_at_twice_the_ceiling_is_taken_back_whole() -> None:
    balancer = _balancer(update_rate=0.2, divergence_ceiling=0.1)
    balancer.sample("r0", LAYER, _gaps(0.0, 1.0), UNMEASURED, now=0.0)

    _close(balancer)

    assert _delta(balancer) == [0.0, 0.0]
    assert balancer.layers[LAYER].withdrawals == 1


def test_traffic_that_changes_within_a_window_is_answered_at_its_first_report() -> None:
    balancer = _balancer(update_rate=0.04, divergence_ceiling=0.1)
    balancer.sample("r0", LAYER, _gaps(0.5, 1.0), UNMEASURED, now=0.0)
    _close(balancer)
    published = _delta(balancer)

    cut = balancer.sample("r0", LAYER, _gaps(0.0, 0.1), Share(800, 1000), now=0.1)

    assert published == pytest.approx([-0.04, 0.04])
    assert cut
    assert _delta(balancer) == [0.0, 0.0]


def test_a_share_that_older_versions_caused_does_not_cut_the_present_one() -> None:
    balancer = _balancer(update_rate=0.04, divergence_ceiling=0.1)
    balancer.sample("r0", LAYER, _gaps(0.5, 1.0), UNMEASURED, now=0.0)
    _close(balancer)

    cut = balancer.sample("r0", LAYER, _gaps(0.5, 1.0), Share(800, 1000), now=0.1)

    assert not cut
    assert _delta(balancer) == pytest.approx([-0.04, 0.04])


def test_the_live_share_is_of_the_last_closed_window() -> None:
    balancer = _balancer()
    for changed in (10, 20):
        balancer.sample("r0", LAYER, _gaps(0.0, 1.0), Share(changed, 100), now=0.0)
    _close(balancer)
    balancer.sample("r0", LAYER, _gaps(0.0, 1.0), Share(99, 100), now=0.0)

    assert balancer.layers[LAYER].measured == Share(30, 200)


@pytest.mark.parametrize("mode", ["frozen", "off"])
def test_freezing_takes_every_delta_back(mode: str) -> None:
    balancer = _balancer()
    _close(balancer)

    balancer.set_mode(mode, reset=False)

    assert _delta(balancer) == [0.0, 0.0]
    assert balancer.progress() == {}


def test_windows_that_are_due_together_are_closed_in_lots_and_none_is_forgotten() -> None:
    balancer = _balancer(mode="adaptive", update_rate=0.25)
    layers = range(58)
    news = {layer: np.array([4, 0]) for layer in layers}
    balancer.count(news, dict.fromkeys(layers, 1), now=0.0)

    lots = []
    while balancer.is_due(now=0.0):
        before = balancer.closed_windows
        assert balancer.close_due(now=0.0)
        lots.append(balancer.closed_windows - before)

    assert max(lots) <= 16
    assert sum(lots) == len(layers)
    assert all(balancer.layers[layer].delta.tolist() == [-0.25, 0.25] for layer in layers)


def test_the_window_that_has_been_open_longest_is_closed_first() -> None:
    balancer = _balancer()
    for layer in range(40):
        balancer.count({layer: np.array([4, 0])}, {layer: 1}, now=-float(layer))

    balancer.close_due(now=0.0)

    assert [layer for layer, each in balancer.layers.items() if each.windows] == [*range(24, 40)]
