"""When experts move by themselves: a skew moves them, noise and a load that was mended do not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.config import RebalanceConfig, rebalance_config
from expertmesh.errors import ConfigError
from expertmesh.model import Slot
from load_controller.rebalancer import Decision, Holder, Rebalancer, View, decide

EXPERTS, SERVERS, LAYER = 32, 4, 3
CONFIG = RebalanceConfig(least_assignments=1000, pause_s=60.0, half_life_windows=2.0)
EVEN = np.full(EXPERTS, 1000, np.int64)
ZIPF = (32_000 / np.arange(1, EXPERTS + 1) ** 0.8).astype(np.int64)


def servers_holding(parts: Sequence[Sequence[int]]) -> list[Holder]:
    """One server a part, each with the shared expert as well."""
    shared = Slot(LAYER, EXPERTS)
    return [
        Holder(f"s{at}", "", frozenset(Slot(LAYER, expert) for expert in part) | {shared})
        for at, part in enumerate(parts)
    ]


IN_ORDER = servers_holding([range(at * 8, at * 8 + 8) for at in range(SERVERS)])


def moved(servers: Sequence[Holder], decision: Decision) -> list[Holder]:
    """The servers after the moves."""
    holds = {server.name: set(server.holds) for server in servers}
    for move in decision.moves:
        slot = Slot(move.layer, move.expert)
        (holds[move.server].add if move.action == "load" else holds[move.server].remove)(slot)
    return [Holder(s.name, s.node, frozenset(holds[s.name])) for s in servers]


def after(*windows: np.ndarray, config: RebalanceConfig = CONFIG) -> Rebalancer:
    """One that has seen these windows."""
    rebalancer = Rebalancer(config)
    total = np.full(EXPERTS, 7, np.int64)  # of before it started
    rebalancer.observe({LAYER: total})
    for window in windows:
        total = total + window
        rebalancer.observe({LAYER: total})
    return rebalancer


def test_a_skewed_load_moves_experts_and_the_same_load_then_moves_none() -> None:
    rebalancer = after(ZIPF)

    first = decide(rebalancer.view(0.0), IN_ORDER, CONFIG)
    there = moved(IN_ORDER, first)
    second = decide(after(ZIPF, ZIPF).view(1e6), there, CONFIG)

    assert first.layers[LAYER].now > 1.0
    assert first.layers[LAYER].planned <= 0.15
    assert second.layers[LAYER].now == pytest.approx(first.layers[LAYER].planned, abs=1e-6)
    assert second.moves == ()
    held = [len([s for s in server.holds if s.expert < EXPERTS]) for server in there]
    assert sum(held) == EXPERTS, "no copy came to stay, none was lost"
    assert all(Slot(LAYER, EXPERTS) in server.holds for server in there), "the shared one stays"


def test_an_even_load_moves_nothing_and_says_why() -> None:
    decision = decide(after(EVEN).view(0.0), IN_ORDER, CONFIG)

    assert decision.moves == ()
    assert decision.reason == "MaxVio of servers is 0.000 in layer 3: up to 0.15 nothing moves"


def test_a_few_counts_are_not_taken_for_a_skew() -> None:
    few = np.zeros(EXPERTS, np.int64)
    few[:2] = 499  # both on one server

    assert decide(after(few).view(0.0), IN_ORDER, CONFIG).moves == ()
    assert decide(after(few, few).view(0.0), IN_ORDER, CONFIG).moves != ()


def test_after_a_migration_it_pauses_then_acts() -> None:
    rebalancer = after(ZIPF)
    rebalancer.moved(100.0)

    during = decide(rebalancer.view(130.0), IN_ORDER, CONFIG)
    later = decide(rebalancer.view(160.0), IN_ORDER, CONFIG)

    assert during.moves == ()
    assert during.reason.endswith("the last migration's pause lasts 30 s more")
    assert later.moves != ()


def test_an_expert_that_no_ready_server_holds_stops_everything() -> None:
    decision = decide(after(ZIPF).view(0.0), IN_ORDER[:3], CONFIG)

    assert decision.moves == ()
    assert decision.reason == "expert 24 of layer 3 is on no server that is ready"


def test_one_server_has_nobody_to_share_with() -> None:
    assert decide(after(ZIPF).view(0.0), IN_ORDER[:1], CONFIG).moves == ()


def test_redundant_slots_are_used_where_they_are_allowed() -> None:
    config = RebalanceConfig(least_assignments=1000, redundant=4)
    hot = EVEN.copy()
    hot[0] = 40_000  # no server can be even with all of it

    without = decide(after(hot).view(0.0), IN_ORDER, CONFIG)
    with_copies = decide(after(hot).view(0.0), IN_ORDER, config)

    assert with_copies.layers[LAYER].planned < without.layers[LAYER].now / 2
    assert sum(m.action == "load" for m in with_copies.moves) > 0


def test_more_redundant_slots_than_fit_are_said_and_nothing_moves() -> None:
    config = RebalanceConfig(least_assignments=1000, redundant=EXPERTS * SERVERS)

    decision = decide(after(ZIPF).view(0.0), IN_ORDER, config)

    assert decision.moves == ()
    assert "do not fit" in decision.reason


def test_an_older_window_weighs_less_and_a_restarted_count_none() -> None:
    rebalancer = after(ZIPF, EVEN, EVEN)
    before = rebalancer.view(0.0).loads[LAYER]

    rebalancer.observe({LAYER: np.zeros(EXPERTS, np.int64)})  # totals that shrank
    same = rebalancer.view(0.0).loads[LAYER]

    shares = np.array([2**-1.0, 2**-0.5, 1.0]) @ np.stack([ZIPF, EVEN, EVEN])
    np.testing.assert_allclose(before / before.sum(), shares / shares.sum())
    np.testing.assert_array_equal(same, before)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), skew=st.floats(0.0, 1.5), redundant=st.integers(0, 8))
def test_moves_can_be_made_bring_what_they_promise_and_are_not_taken_back(
    seed: int, skew: float, redundant: int
) -> None:
    generator = np.random.default_rng(seed)
    load = generator.permutation(1e5 * np.arange(1, EXPERTS + 1) ** -skew)
    config = RebalanceConfig(least_assignments=1, redundant=redundant)
    view = View({LAYER: load}, None)

    first = decide(view, IN_ORDER, config)
    there = moved(IN_ORDER, first)
    second = decide(view, there, config)

    covered = frozenset().union(*(server.holds for server in there))
    assert covered >= {Slot(LAYER, expert) for expert in range(EXPERTS)}
    assert second.moves == ()
    if first.moves:
        assert first.layers[LAYER].planned < first.layers[LAYER].now - config.least_gain
        assert second.layers[LAYER].now == pytest.approx(first.layers[LAYER].planned, abs=1e-6)


def test_a_command_line_gives_defaults_settings_or_none() -> None:
    assert rebalance_config(None) is None
    assert rebalance_config("") == RebalanceConfig()
    assert rebalance_config("pause_s=5,redundant=none") == RebalanceConfig(pause_s=5.0)


@pytest.mark.parametrize(
    ("settings_", "said"),
    [("window_s=0", "rebalance.window_s"), ("max_violation=-1", "rebalance.max_violation"),
     ("redundant=-1", "rebalance.redundant"), ("least_assignments=0", "least_assignments"),
     ("speed=3", "a setting of rebalance")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_name(settings_: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RebalanceConfig().with_settings([settings_])


def test_a_slower_server_gets_less_to_do() -> None:
    """Even counts, but the first server takes twice as long."""
    slow = [
        Holder(each.name, "", each.holds, 0.5 if each.name == "s0" else 1.0) for each in IN_ORDER
    ]
    config = RebalanceConfig(least_assignments=1000, redundant=8)

    decision = decide(after(EVEN).view(0.0), slow, config)
    there = {server.name: server.holds for server in moved(slow, decision)}

    assert decision.layers[LAYER].now == pytest.approx(2 / (4 / 3.5) - 1)
    assert decision.layers[LAYER].planned < 0.5 * decision.layers[LAYER].now
    assert len(there["s1"]) > len(IN_ORDER[1].holds)
