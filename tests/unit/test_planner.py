"""What every plan must hold, and choices one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import ConfigError
from expertmesh.model import LayerSpec, ModelSpec, Slot
from expertmesh.placement import SlotMap
from load_controller.planner import Placement, Plan, Server, plan_placement
from tests.plans import README, Floats, alike_servers, zipf

# What every plan must hold, on drawn clusters.


@st.composite
def _tasks(draw: st.DrawFn) -> tuple[Floats, list[Server], int, int | None]:
    """Load, servers of unlike rate and capacity, redundant slots that fit, groups."""
    layers, groups = draw(st.integers(1, 3)), draw(st.sampled_from([None, 2, 4]))
    experts = (groups or 1) * draw(st.integers(1, 5))
    nodes = draw(st.integers(1, 3))
    rates = draw(st.lists(st.sampled_from([1.0, 1.0, 2.5, 10.0]), min_size=1, max_size=8))
    alike = draw(st.booleans())
    servers = [
        Server(
            name=f"s{i}",
            node=f"n{i % nodes}",
            rate=1.0 if alike else rate,
            capacity=None if alike else draw(st.integers(-(-experts // len(rates)), experts + 2)),
        )
        for i, rate in enumerate(rates)
    ]
    room = sum(experts if s.capacity is None else min(s.capacity, experts) for s in servers)
    redundant = draw(st.integers(0, room - experts))
    cells = st.one_of(st.just(0.0), st.integers(1, 1000).map(float), st.floats(0, 1e12))
    rows = st.lists(cells, min_size=experts, max_size=experts)
    load = draw(st.lists(rows, min_size=layers, max_size=layers))
    return np.array(load), servers, redundant, groups


def _check(plan: Plan, servers: list[Server], experts: int, redundant: int) -> None:
    holds = plan.placement.holds
    total = experts + redundant
    assert holds.any(1).all()  # bool [L, S, E]: two copies on one server cannot be said
    assert (holds.sum((1, 2)) <= total).all()
    for row, server in enumerate(servers):
        if server.capacity is not None:
            assert (holds[:, row].sum(1) <= server.capacity).all()
    assert (plan.weights[~holds] == 0).all()
    assert plan.weights.min() >= 0
    assert plan.weights.sum(1) == pytest.approx(1.0)


@settings(max_examples=150, deadline=None)
@given(_tasks())
@pytest.mark.slow
def test_every_expert_has_a_slot_and_no_capacity_or_budget_is_exceeded(
    task: tuple[Floats, list[Server], int, int | None],
) -> None:
    load, servers, redundant, groups = task

    plan = plan_placement(load, servers, redundant, groups=groups)

    _check(plan, servers, load.shape[1], redundant)
    if all(server.capacity is None for server in servers):
        assert (plan.placement.holds.sum((1, 2)) == load.shape[1] + redundant).all()


@settings(max_examples=100, deadline=None)
@given(_tasks(), st.integers(0, 2**31))
@pytest.mark.slow
def test_moves_lead_from_any_current_placement_to_the_plan(
    task: tuple[Floats, list[Server], int, int | None], seed: int
) -> None:
    load, servers, redundant, groups = task
    names = tuple(server.name for server in servers)
    shape = (len(load), len(servers), load.shape[1])
    current = Placement(names, np.random.default_rng(seed).random(shape) < 0.4)

    plan = plan_placement(load, servers, redundant, current, groups=groups)

    _check(plan, servers, load.shape[1], redundant)
    holds = current.holds.copy()
    for move in plan.moves:
        at = (move.layer, names.index(move.server), move.expert)
        assert holds[at] == (move.action == "drop")
        holds[at] = move.action == "load"
    assert (holds == plan.placement.holds).all()


@settings(max_examples=150, deadline=None)
@given(_tasks(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.01]), st.booleans())
@pytest.mark.slow
def test_planning_again_with_the_same_load_moves_nothing(
    task: tuple[Floats, list[Server], int, int | None], cost: float, gain: float, drifted: bool
) -> None:
    load, servers, redundant, groups = task
    options = {"move_cost": cost, "least_gain": gain}
    plan = plan_placement(load, servers, redundant, groups=groups)
    if drifted:
        load = load[:, ::-1].copy()
        plan = plan_placement(load, servers, redundant, plan.placement, groups=groups, **options)

    again = plan_placement(load, servers, redundant, plan.placement, groups=groups, **options)

    assert again.moves == ()


# Choices, one by one.


def test_a_small_drift_moves_far_fewer_slots_than_a_plan_from_nothing() -> None:
    load = zipf(3, 64, 1.0, seed=5)
    servers = alike_servers(8)
    plan = plan_placement(load, servers, 8)
    drift = load * np.random.default_rng(6).lognormal(0, 0.2, load.shape)

    later = plan_placement(drift, servers, 8, plan.placement)

    assert later.violation_before is not None
    assert (later.violation_after <= later.violation_before).all()
    assert sum(move.action == "load" for move in later.moves) <= 3 * 72 // 4


def test_a_dearer_move_leaves_the_placement_alone() -> None:
    load = zipf(2, 32, 0.8, seed=7)
    servers = alike_servers(4)
    plan = plan_placement(load, servers, 0)
    drift = load * np.random.default_rng(8).lognormal(0, 0.4, load.shape)

    dear = plan_placement(drift, servers, 0, plan.placement, move_cost=1000.0)
    cheap = plan_placement(drift, servers, 0, plan.placement, move_cost=0.0)

    assert dear.moves == ()
    assert cheap.violation_after.max() < dear.violation_after.max()


def test_a_layer_without_load_keeps_the_placement_it_has() -> None:
    servers = alike_servers(4)
    plan = plan_placement(zipf(1, 16, 1.2, seed=1), servers, 4)

    later = plan_placement(np.zeros((1, 16)), servers, 4, plan.placement)

    assert later.moves == ()
    assert later.violation_after.tolist() == [0.0]


def test_experts_of_a_server_that_is_gone_are_loaded_elsewhere() -> None:
    load = zipf(2, 16, 0.8, seed=2)
    servers = [Server(name=f"s{i}", capacity=6) for i in range(4)]
    plan = plan_placement(load, servers, 2)

    later = plan_placement(load, servers[:3], 2, plan.placement)

    assert later.placement.holds.any(1).all()
    assert all(move.server != "s3" for move in later.moves)


def test_redundant_copies_go_when_the_budget_does() -> None:
    load = zipf(2, 16, 0.8, seed=2)
    servers = [Server(name=f"s{i}", capacity=6) for i in range(4)]
    plan = plan_placement(load, servers, 8)

    later = plan_placement(load, servers, 0, plan.placement)

    assert later.placement.holds.sum((1, 2)).tolist() == [16, 16]


def test_the_hottest_expert_gets_the_copy() -> None:
    plan = plan_placement([[1.0, 9.0, 1.0, 1.0]], [Server(name="a"), Server(name="b")], 2)

    assert plan.placement.holds.sum(1)[0].tolist()[1] == 2


def test_a_faster_server_gets_more_of_the_rows() -> None:
    servers = [Server(name="gpu", rate=9.0, capacity=4), Server(name="cpu", rate=1.0, capacity=4)]

    plan = plan_placement([[10.0, 10.0, 10.0, 10.0]], servers, 4)

    assert plan.loads_after[0].tolist() == pytest.approx([36.0, 4.0])
    assert plan.violation_after[0] == pytest.approx(0.0, abs=1e-6)


def test_a_plan_for_even_division_expects_what_even_division_brings() -> None:
    plan = plan_placement(README, alike_servers(8), 4, weighted=False)

    holds = plan.placement.holds
    assert plan.weights == pytest.approx(holds / holds.sum(1, keepdims=True))
    assert plan.loads_after == pytest.approx(plan.placement.even_loads(README))
    assert (plan.violation_after <= [0.0726, 0.1904]).all()  # the published figures


def test_copies_stay_on_the_node_of_their_group_where_groups_divide() -> None:
    plan = plan_placement(zipf(3, 32, 1.0, seed=9), alike_servers(8, nodes=2), 8, groups=4)

    by_node = plan.placement.holds.reshape(3, 2, 4, 4, 8).any((2, 4))  # layer, node, group
    assert (by_node.sum(1) == 1).all()
    assert (by_node.sum(2) == 2).all()


def test_nodes_do_not_matter_where_groups_do_not_divide_among_them() -> None:
    load = zipf(1, 30, 1.0, seed=9)

    with_nodes = plan_placement(load, alike_servers(6, nodes=2), 6, groups=3)

    assert (
        with_nodes.placement.holds == plan_placement(load, alike_servers(6), 6).placement.holds
    ).all()


def test_the_routed_part_of_a_slot_map_is_a_placement() -> None:
    layer = LayerSpec(
        index=5, num_experts=3, intermediate_size=8, shared_intermediate_size=8, gate=None
    )
    spec = ModelSpec(model_type="t", hidden_size=8, dtype=torch.float32, layers=(layer,))
    slot_map = SlotMap.of(1, spec, {"a": [Slot(5, 0), Slot(5, 3)], "b": [Slot(5, 1), Slot(5, 2)]})

    placement = Placement.of(slot_map, [5], 3)

    assert placement.holds.tolist() == [[[True, False, False], [False, True, True]]]
    assert placement.on(["b", "c"])[0].tolist() == [[False, True, True], [False] * 3]


@pytest.mark.parametrize(
    ("load", "servers", "redundant", "message"),
    [
        ([1.0, 2.0], alike_servers(1), 0, "expected \\[layers, experts\\]"),
        ([[1.0, -2.0]], alike_servers(1), 0, "negative or non-finite"),
        ([[1.0, float("nan")]], alike_servers(1), 0, "negative or non-finite"),
        ([[1.0, 2.0]], [], 0, "no servers"),
        ([[1.0, 2.0]], [Server(name="a"), Server(name="a")], 0, "same name"),
        ([[1.0, 2.0]], [Server(name="a", rate=0.0)], 0, "rate 0.0"),
        ([[1.0, 2.0]], [Server(name="a", capacity=-1)], 0, "capacity -1"),
        ([[1.0, 2.0]], alike_servers(1), -1, "redundant is -1"),
        ([[1.0, 2.0]], [Server(name="a", capacity=1)], 0, "do not fit the 1 slots"),
        ([[1.0, 2.0]], alike_servers(1), 1, "do not fit the 2 slots"),
    ],
)
def test_a_task_that_cannot_be_planned_is_refused(
    load: object, servers: list[Server], redundant: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_placement(load, servers, redundant)  # type: ignore[arg-type]


def test_a_current_placement_of_another_model_is_refused() -> None:
    current = Placement(("a",), np.ones((1, 1, 3), np.bool_))

    with pytest.raises(ConfigError, match="1 layers of 3 experts, the load 1 of 2"):
        plan_placement([[1.0, 2.0]], [Server(name="a")], 0, current)
