"""From what there is and what there should be to the next steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertmesh.config import AutoscaleConfig
from expertmesh.errors import NoRoomError, UnavailableError
from expertmesh.model import GateSpec, LayerSpec, ModelSpec, Slot
from expertmesh.placement import initial_parts
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2
from fleet.measured import Looks, quantile, rates
from fleet.moves_away import Room, moves_away
from fleet.redundancy import moves_to_have, redundant_slots
from fleet.scaling import (
    DRAIN_S,
    FAILED_S,
    Drain,
    End,
    Member,
    ServerPlan,
    Start,
    bounded,
    next_steps,
)
from load_controller.planner import Move

_GATE = GateSpec(score="softmax", top_k=2)
_MODEL = ModelSpec(
    model_type="test",
    hidden_size=8,
    dtype=torch.float32,
    layers=(
        LayerSpec(index=0, num_experts=0, intermediate_size=0, shared_intermediate_size=4),
        LayerSpec(
            index=1, num_experts=4, intermediate_size=8, shared_intermediate_size=0, gate=_GATE
        ),
    ),
)
_PARTS = [frozenset(part) for part in initial_parts(_MODEL, 2)]
_PLAN = ServerPlan(_MODEL, 2)
_COUNTS = {1: np.array([10, 20, 30, 1000], np.int64)}


def _slots(*experts: int) -> frozenset[Slot]:
    return frozenset(Slot(1, expert) for expert in experts)


def _ready(name: str, holds: frozenset[Slot], node: str = "", ours: bool = True) -> Member:
    return Member(name=name, state="ready", node=node or name, holds=holds, is_ours=ours)


_TWO = (_ready("shard0-replica0", _PARTS[0]), _ready("shard1-replica0", _PARTS[1]))


def test_a_cluster_that_is_as_it_should_be_is_left_alone() -> None:
    assert next_steps(_TWO, 2, _PLAN, _COUNTS) == ()


def test_servers_that_are_missing_are_asked_for_with_what_does_most_a_copy() -> None:
    (start,) = next_steps(_TWO, 3, _PLAN, _COUNTS)

    assert isinstance(start, Start)
    assert start.name == "auto-1"
    assert {slot.expert for slot in start.slots if slot.layer == 1} == {2, 3}


def test_two_new_servers_do_not_choose_the_same_where_others_do_more() -> None:
    first, second = next_steps(_TWO, 4, _PLAN, {1: np.array([100, 90, 80, 70], np.int64)})

    assert isinstance(first, Start)
    assert isinstance(second, Start)
    assert {slot.expert for slot in first.slots if slot.layer == 1} == {0, 1}
    assert {slot.expert for slot in second.slots if slot.layer == 1} == {2, 3}


def test_what_nobody_holds_is_brought_back_first() -> None:
    (start,) = next_steps(_TWO[:1], 2, _PLAN, _COUNTS)

    assert isinstance(start, Start)
    assert {slot.expert for slot in start.slots if slot.layer == 1} == {2, 3}


def test_servers_that_start_are_not_asked_for_again() -> None:
    starting = Member(name="auto-1", state="asked")

    assert next_steps((*_TWO, starting), 3, _PLAN, _COUNTS) == ()


def test_a_name_is_not_used_again_while_its_last_bearer_is_known() -> None:
    drained = Member(name="auto-4", state="draining", is_ours=False)

    (start,) = next_steps((*_TWO, drained), 3, _PLAN, _COUNTS)

    assert isinstance(start, Start)
    assert start.name == "auto-5"


def test_one_server_too_many_drains_the_one_with_the_least_to_move() -> None:
    added = _ready("auto-1", _slots(2, 3))

    assert next_steps((*_TWO, added), 2, _PLAN, _COUNTS) == (Drain("auto-1", ()),)


def test_a_server_that_was_started_by_hand_goes_after_ours_but_before_one_that_has_to_move() -> (
    None
):
    by_hand = _ready("mine", _slots(2), ours=False)
    added = _ready("auto-1", _slots(2, 3))

    assert next_steps((*_TWO, by_hand, added), 3, _PLAN, _COUNTS) == (Drain("auto-1", ()),)
    assert next_steps((*_TWO, by_hand), 2, _PLAN, _COUNTS) == (Drain("mine", ()),)


def test_one_server_drains_at_a_time() -> None:
    two = [_ready("auto-1", _slots(2, 3)), _ready("auto-2", _slots(2, 3))]
    drains = Member(name="auto-3", state="draining", for_s=DRAIN_S / 2)
    drained = Member(name="auto-3", state="draining", is_ours=False)

    assert next_steps((*_TWO, *two, drains), 2, _PLAN, _COUNTS) == ()
    assert next_steps((*_TWO, *two, drained), 2, _PLAN, _COUNTS) == (Drain("auto-2", ()),)


def test_a_server_that_has_not_started_is_ended_before_one_that_serves_is_drained() -> None:
    asked = Member(name="auto-2", state="asked")
    added = _ready("auto-1", _slots(2, 3))

    (end,) = next_steps((*_TWO, added, asked), 3, _PLAN, _COUNTS)

    assert isinstance(end, End)
    assert end.name == "auto-2"


def test_a_restarting_server_that_alone_held_an_expert_is_waited_for() -> None:
    back = Member(name="auto-1", state="lost", holds=_slots(3))
    running = _ready("shard0-replica0", _PARTS[0] | _slots(2))
    other = _ready("auto-2", _PARTS[0])

    assert next_steps((running, other, back), 2, _PLAN, _COUNTS) == (Drain("auto-2", ()),)


def test_a_server_that_cannot_load_is_replaced_after_a_while_and_not_at_once() -> None:
    def failed(for_s: float) -> Member:
        return Member(name="auto-1", state="failed", for_s=for_s)

    early = next_steps((*_TWO, failed(FAILED_S / 2)), 3, _PLAN, _COUNTS)
    late = next_steps((*_TWO, failed(FAILED_S + 1)), 3, _PLAN, _COUNTS)

    assert early == ()
    assert [type(step) for step in late] == [End, Start]


def test_a_server_that_does_not_finish_draining_is_ended() -> None:
    stuck = Member(name="auto-1", state="draining", for_s=DRAIN_S + 1)

    assert next_steps((*_TWO, stuck), 2, _PLAN, _COUNTS) == (End("auto-1", "it has drained"),)


def test_fewer_servers_than_hold_the_model_are_refused() -> None:
    with pytest.raises(NoRoomError, match="no other server has room"):
        next_steps(_TWO, 1, _PLAN, _COUNTS)


def test_bounds_by_hand_replace_those_of_the_start() -> None:
    config = AutoscaleConfig(min_replicas=2, max_replicas=4)

    found = [bounded(config, *hand) for hand in ((0, 0), (3, 3), (6, 0), (0, 1))]

    assert [(each.min_replicas, each.max_replicas) for each in found] == [
        (2, 4), (3, 3), (6, 6), (1, 1),
    ]  # fmt: skip


def test_moving_away_leaves_every_expert_with_a_server_that_has_room() -> None:
    holds = {"a": _slots(0, 1), "b": _slots(2), "c": _slots(3)}

    moves = moves_away("a", holds, _COUNTS, Room({1: 4}, slots=2))

    assert sorted(moves) == [Move("load", 1, 0, "c"), Move("load", 1, 1, "b")]


def test_a_full_server_gives_up_a_copy_for_an_expert_that_would_have_none() -> None:
    holds = {"a": _slots(0, 1), "b": _slots(2, 3), "c": _slots(1, 3)}

    moves = moves_away("a", holds, _COUNTS, Room({1: 4}, slots=2))

    assert moves == (Move("load", 1, 0, "b"), Move("drop", 1, 3, "b"))


def test_the_last_copy_of_an_expert_stays_where_nobody_has_room() -> None:
    holds = {"a": _slots(0, 1), "b": _slots(2, 3)}

    with pytest.raises(NoRoomError, match="expert 1 of layer 1 is only on a"):
        moves_away("a", holds, _COUNTS, Room({1: 4}, slots=2))
    with pytest.raises(UnavailableError, match="no server but a is ready"):
        moves_away("a", {"a": _slots(0)}, _COUNTS, Room({1: 4}, slots=2))


def test_shared_experts_take_no_room_of_routed_ones() -> None:
    holds = {"a": frozenset({Slot(1, 4)}), "b": _slots(0, 1, 2, 3)}

    assert moves_away("a", holds, _COUNTS, Room({1: 4}, slots=4)) == (Move("load", 1, 4, "b"),)


@pytest.mark.parametrize("seed", range(30))
def test_servers_may_go_as_long_as_the_others_have_room_in_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    experts, slots = 8, 4
    parts = [range(0, 4), range(4, 8)]
    chosen = [*parts, *(draw.choice(experts, slots, replace=False).tolist() for _ in range(3))]
    holds = {f"s{i}": set(_slots(*part)) for i, part in enumerate(chosen)}
    room, counts = Room({1: experts}, slots), {1: draw.integers(0, 1000, experts)}

    for name in draw.permutation(sorted(holds)).tolist()[:3]:
        for move in moves_away(name, holds, counts, room):
            slot = Slot(move.layer, move.expert)
            if move.action == "load":
                holds[move.server].add(slot)
            else:
                holds[move.server].remove(slot)
        del holds[name]

    assert set().union(*holds.values()) == _slots(*range(experts))
    assert max(len(each) for each in holds.values()) <= slots


def test_quiet_hours_leave_no_redundant_copy_and_busy_ones_bring_them_back() -> None:
    holds = {"a": set(_slots(0, 1)), "b": set(_slots(2, 3)), "c": set(_slots(2, 3))}
    nodes, room = {"a": "n", "b": "n", "c": "n"}, Room({1: 4}, slots=2)

    def apply(moves: tuple[Move, ...]) -> int:
        for move in moves:
            slots = holds[move.server]
            (slots.add if move.action == "load" else slots.remove)(Slot(1, move.expert))
        return redundant_slots(holds, room)

    quiet = apply(moves_to_have(0, holds, nodes, _COUNTS, room))
    covered = set().union(*holds.values())
    busy = apply(moves_to_have(2, holds, nodes, _COUNTS, room))

    assert (quiet, covered, busy) == (0, _slots(0, 1, 2, 3), 2)


def test_copies_that_come_back_go_to_servers_that_are_fast() -> None:
    holds = {"a": _slots(0, 1, 2, 3), "b": frozenset[Slot](), "c": frozenset[Slot]()}
    room, nodes = Room({1: 4}, slots=4), dict.fromkeys(holds, "n")

    def loads(rates: dict[str, float]) -> set[str]:
        moves = moves_to_have(1, holds, nodes, _COUNTS, room, rates)
        return {m.server for m in moves if m.action == "load" and m.expert == 3}

    assert loads({"b": 1.0, "c": 0.1}) == {"b"}
    assert loads({"b": 0.1, "c": 1.0}) == {"c"}


def _load(uptime_s: float, busy_s: float, ongoing_s: float, *delays: int, now: int = 0) -> (
    pb.DeviceLoad
):  # fmt: skip
    return pb.DeviceLoad(
        uptime_us=round(uptime_s * 1e6), busy_us=round(busy_s * 1e6),
        ongoing_us=round(ongoing_s * 1e6), ongoing=now,
        queue_delays=[*delays, *([0] * (12 - len(delays)))],
    )  # fmt: skip


def test_rates_are_those_between_two_messages() -> None:
    found = rates(_load(10, 2, 3, 5), _load(14, 4, 11, 5, 40))

    assert found is not None
    assert (found.utilization, found.ongoing) == (0.5, 2.0)
    assert sum(found.delays) == 40


def test_a_queue_that_grows_is_work_that_was_offered() -> None:
    found = rates(_load(0, 0, 0), _load(1, 1.0, 10, 10, now=5))

    assert found is not None
    assert found.utilization == 1.5


def test_what_is_not_known_is_not_zero() -> None:
    looks = Looks()

    def look(name: str, incarnation: str, load: pb.DeviceLoad) -> tuple[float | None, int]:
        server = router_pb2.ServerStatus(server_id=name, state="ready", incarnation=incarnation)
        sample = looks.sample([pb.FleetServer(server=server, load=load)])
        return sample.utilization, sample.reporting

    first = look("a", "1", _load(1, 0.5, 0))
    second = look("a", "1", _load(2, 0.7, 0))
    silent = look("a", "1", _load(2, 0.7, 0))
    restarted = look("a", "2", _load(1, 0.1, 0))

    assert first == (None, 0)
    assert second == (pytest.approx(0.2), 1)
    assert silent == second
    assert restarted == (None, 0)


def test_the_delay_is_the_quantile_over_all_servers() -> None:
    assert quantile([0] * 12) == 0.0
    assert quantile([100] + [0] * 11) == pytest.approx(0.00099)
    assert quantile([90, 0, 0, 0, 0, 0, 10] + [0] * 5) == pytest.approx(0.095)
