"""Plans of a few experts, written out: what moves, when it pays, and what it brings."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expertmesh.errors import ConfigError
from expertmesh.placement import SlotMap
from load_controller.planner import Move, Placement, Server, plan_placement

SERVERS = [Server(name="a"), Server(name="b")]
#: 6 against 2 where it is; 4 against 4 when one of the heavy experts and a light one change places.
LOAD = [[3.0, 3.0, 1.0, 1.0]]
CURRENT = Placement(("a", "b"), np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], np.bool_))


def test_a_plan_says_what_to_load_then_what_to_drop_and_what_that_brings() -> None:
    plan = plan_placement(LOAD, SERVERS, 0, CURRENT)

    assert plan.moves == (
        Move("load", 0, 2, "a"),
        Move("load", 0, 0, "b"),
        Move("drop", 0, 0, "a"),
        Move("drop", 0, 2, "b"),
    )
    assert plan.placement.servers == ("a", "b")
    assert plan.placement.holds[0].tolist() == [
        [False, True, True, False],
        [True, False, False, True],
    ]
    assert plan.weights.tolist() == plan.placement.holds.astype(float).tolist()
    assert plan.loads_before is not None
    assert plan.violation_before is not None
    assert plan.loads_before.tolist() == [[6.0, 2.0]]
    assert plan.loads_after.tolist() == [[4.0, 4.0]]
    assert plan.violation_before.tolist() == [0.5]
    assert plan.violation_after.tolist() == [0.0]


def test_loads_of_a_narrow_type_add_up() -> None:
    load = np.array([[60000, 60000, 20000, 20000]], np.float16)  # together more than it holds

    plan = plan_placement(load, SERVERS, 0, CURRENT)

    assert plan.loads_after.tolist() == [[80000.0, 80000.0]]


def test_a_plan_from_nothing_loads_every_slot_and_had_no_load_before() -> None:
    plan = plan_placement([[3.0, 1.0]], SERVERS, 0)

    assert plan.moves == (Move("load", 0, 0, "a"), Move("load", 0, 1, "b"))
    assert plan.loads_before is None
    assert plan.violation_before is None
    assert plan.violation_after.tolist() == [0.5]


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"move_cost": 0.98, "least_gain": 0.0}, True),
        ({"move_cost": 1.02, "least_gain": 0.0}, False),
        ({"move_cost": 0.0, "least_gain": 0.49}, True),
        ({"move_cost": 0.0, "least_gain": 0.51}, False),
        ({"move_cost": 0.5, "least_gain": 0.24}, True),
        ({"move_cost": 0.5, "least_gain": 0.26}, False),
    ],
)
def test_two_of_four_slots_move_if_half_the_cost_and_the_least_gain_are_below_what_they_bring(
    options: dict[str, float], moves: bool
) -> None:
    """They bring 0.5 in MaxVio."""
    plan = plan_placement(LOAD, SERVERS, 0, CURRENT, **options)  # type: ignore[arg-type]

    assert bool(plan.moves) is moves


def test_only_layers_that_gain_are_changed() -> None:
    holds = np.concatenate([CURRENT.holds, [[[1, 0, 1, 0], [0, 1, 0, 1]]]]).astype(np.bool_)

    plan = plan_placement(LOAD * 2, SERVERS, 0, Placement(("a", "b"), holds))

    assert {move.layer for move in plan.moves} == {0}


@pytest.mark.parametrize("load", [0.1, 0.0], ids=["little load", "none"])
def test_a_layer_without_load_stays_as_it_is_and_one_with_little_does_not(load: float) -> None:
    current = Placement(("a", "b"), np.array([[[1, 1, 1, 0], [0, 0, 0, 1]]], np.bool_))
    servers = [Server(name="a", capacity=3), Server(name="b", capacity=3)]

    plan = plan_placement([[load] * 4], servers, 0, current)

    assert bool(plan.moves) is (load > 0)


def test_groups_stay_on_one_node_where_there_are_several() -> None:
    servers = [Server(name=name, node=name[0]) for name in ("a0", "a1", "b0", "b1")]

    plan = plan_placement([[9.0, 1.0, 8.0, 1.0]], servers, 0, groups=2)

    assert plan.placement.holds[0, :2].any(0).tolist() == [True, True, False, False]
    assert plan.placement.holds[0, 2:].any(0).tolist() == [False, False, True, True]


def test_weights_of_every_layer_are_those_of_its_own_loads() -> None:
    servers = [Server(name="a", capacity=2), Server(name="b", capacity=1)]

    plan = plan_placement([[8.0, 2.0], [1.0, 5.0], [3.0, 3.0]], servers, 1)

    # The heavier expert is on both, the other beside it on "a", which does so much less of it.
    assert plan.weights[0].tolist() == [pytest.approx([0.375, 1.0]), pytest.approx([0.625, 0.0])]
    assert plan.weights[1].tolist() == [pytest.approx([1.0, 0.4]), pytest.approx([0.0, 0.6])]
    assert plan.loads_after.tolist() == [pytest.approx(each) for each in ([5, 5], [3, 3], [3, 3])]


def test_copies_share_an_experts_rows_by_weight_and_an_idle_expert_evenly() -> None:
    """One layer in which expert 1 gets nothing. With copies everywhere, weights even out what
    unlike servers can do; without weights the slower one has half of it."""
    servers = [Server(name="a", rate=3.0, capacity=2), Server(name="b", rate=1.0, capacity=2)]

    plan = plan_placement([[8.0, 0.0]], servers, 2)
    even = plan_placement([[8.0, 0.0]], servers, 2, weighted=False)

    assert plan.weights[0, :, 0].tolist() == pytest.approx([0.75, 0.25])
    assert plan.weights[0].sum(0).tolist() == pytest.approx([1.0, 1.0])
    assert plan.loads_after[0].tolist() == pytest.approx([6.0, 2.0])
    assert plan.violation_after.tolist() == pytest.approx([0.0])
    assert even.weights[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert even.loads_after[0].tolist() == [4.0, 4.0]
    assert even.violation_after.tolist() == [1.0]


def test_an_expert_that_was_lost_weighs_nothing_before_and_is_loaded() -> None:
    current = Placement(("a", "b"), np.array([[[1, 0], [0, 0]]], np.bool_))

    plan = plan_placement([[1.0, 1.0]], SERVERS, 0, current)

    assert plan.loads_before is not None
    assert plan.loads_before.tolist() == [[1.0, 0.0]]
    assert plan.moves == (Move("load", 0, 1, "b"),)


def test_a_placement_on_other_servers_leaves_out_who_is_gone_and_gives_new_ones_nothing() -> None:
    holds = np.array([[[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [0, 0, 0]]], np.bool_)
    placement = Placement(("a", "b"), holds)

    assert placement.on(["c", "b", "a"]).astype(int).tolist() == [
        [[0, 0, 0], [0, 1, 0], [1, 0, 1]],
        [[0, 0, 0], [0, 0, 0], [1, 1, 1]],
    ]


def test_even_loads_divide_an_experts_load_by_its_copies_and_leave_out_what_nobody_holds() -> None:
    holds = np.array([[[1, 1, 0], [0, 1, 0]]], np.bool_)

    loads = Placement(("a", "b"), holds).even_loads([[4.0, 6.0, 9.0]])

    assert loads.tolist() == [[7.0, 3.0]]
    narrow = Placement(("a", "b"), holds).even_loads(np.ones((1, 3), np.float32))
    assert narrow.dtype == np.float64


def test_a_placement_has_the_routed_experts_of_the_layers_asked_for_in_their_order() -> None:
    holds = {5: np.array([[1, 0, 1], [0, 1, 1]]), 2: np.array([[1, 1, 0], [0, 0, 1]])}
    slot_map = SlotMap(1, ("a", "b"), {layer: table > 0 for layer, table in holds.items()})

    placement = Placement.of(slot_map, [5, 2], 2)

    assert placement.servers == ("a", "b")
    assert placement.holds.dtype == np.bool_
    assert placement.holds.astype(int).tolist() == [[[1, 0], [0, 1]], [[1, 1], [0, 0]]]
    assert Placement.of(slot_map, [], 2).holds.shape == (0, 2, 2)
    assert Placement.of(SlotMap(1, (), {5: holds[5][:0]}), [5], 2).holds.dtype == np.bool_


@pytest.mark.parametrize("load", [[[math.inf, 1.0]], np.ones((0, 2)), np.ones((1, 0)), 1.0])
def test_a_load_that_is_none_is_refused(load: object) -> None:
    with pytest.raises(ConfigError, match="load h"):
        plan_placement(load, SERVERS, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 2, 4), (1, 2, 3)], ids=["layers", "experts"])
def test_a_current_placement_for_another_model_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="pass both for the same layers"):
        plan_placement(LOAD, SERVERS, 0, Placement(("a", "b"), np.ones(shape, np.bool_)))
