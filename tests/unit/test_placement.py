"""Initial placement and slot maps, without a network."""

from __future__ import annotations

import pytest
import torch

from expertmesh import placement
from expertmesh.errors import ConfigError
from expertmesh.model import GateSpec, LayerSpec, ModelSpec, Slot
from expertmesh.placement import SlotMap


def _spec(experts: int, layers: int = 3, shared: int = 16, dense: int = 0) -> ModelSpec:
    gate = GateSpec(score="softmax", top_k=2)
    moe = [
        LayerSpec(
            index=index,
            num_experts=experts,
            intermediate_size=16,
            shared_intermediate_size=shared,
            gate=gate,
        )
        for index in range(bool(dense), layers)
    ]
    first = [LayerSpec(index=0, num_experts=0, intermediate_size=0, shared_intermediate_size=dense)]
    return ModelSpec(
        model_type="t",
        hidden_size=8,
        dtype=torch.float32,
        layers=tuple((first if dense else []) + moe),
    )


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("experts", [8, 60])
def test_every_routed_expert_is_in_exactly_one_part(shards: int, experts: int) -> None:
    spec = _spec(experts)

    parts = placement.initial_parts(spec, shards)

    routed = sorted(slot for part in parts for slot in part if slot.expert < experts)
    assert routed == [Slot(layer, e) for layer in range(3) for e in range(experts)]


def test_parts_differ_by_at_most_one_slot_when_experts_do_not_divide() -> None:
    parts = placement.initial_parts(_spec(8, layers=6, shared=0), 3)

    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_runs_of_experts_stay_together_and_in_their_part_where_they_divide_evenly() -> None:
    parts = placement.initial_parts(_spec(8, layers=2, shared=0), 2)

    assert [placement.group_by_layer(part) for part in parts] == [
        {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]},
        {0: [4, 5, 6, 7], 1: [4, 5, 6, 7]},
    ]


def test_runs_that_are_one_longer_move_on_by_a_part_from_layer_to_layer() -> None:
    parts = placement.initial_parts(_spec(5, layers=3, shared=0), 3)

    assert [placement.group_by_layer(part) for part in parts] == [
        {0: [0], 1: [3, 4], 2: [1, 2]},
        {0: [1, 2], 1: [0], 2: [3, 4]},
        {0: [3, 4], 1: [1, 2], 2: [0]},
    ]


@pytest.mark.parametrize(("shared", "copies"), [(32, 2), (33, 1)])
def test_a_shared_expert_goes_everywhere_up_to_a_quarter_of_a_part(
    shared: int, copies: int
) -> None:
    """Of 96 + 32, a part is 64, and the copy that is one too many makes it 16 larger."""
    parts = placement.initial_parts(_spec(6, layers=2, shared=shared), 2)

    assert [sum(Slot(layer, 6) in part for part in parts) for layer in range(2)] == [copies] * 2


def test_slots_travel_by_layer_in_ascending_order() -> None:
    slots = [Slot(3, 7), Slot(1, 2), Slot(3, 0), Slot(1, 1)]

    grouped = placement.group_by_layer(slots)

    assert list(grouped.items()) == [(1, [1, 2]), (3, [0, 7])]
    assert placement.group_by_layer([]) == {}


def test_a_small_shared_expert_is_on_every_part() -> None:
    parts = placement.initial_parts(_spec(60), 3)

    assert all(Slot(layer, 60) in part for part in parts for layer in range(3))


def test_large_dense_layers_are_spread_in_turn() -> None:
    spec = _spec(8, layers=3, shared=256, dense=512)

    parts = placement.initial_parts(spec, 2)

    assert [sum(s == Slot(0, 0) for s in part) for part in parts] == [1, 0]
    assert [sum(s == Slot(1, 8) for s in part) for part in parts] == [0, 1]


def test_more_shards_than_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="use fewer shards"):
        placement.initial_parts(_spec(1, layers=1, shared=0), 4)


def test_a_slot_map_knows_what_nobody_holds() -> None:
    spec = _spec(4, layers=1, shared=0)

    partial = SlotMap.of(3, spec, {"a": [Slot(0, 0), Slot(0, 1)], "b": [Slot(0, 3)]})

    assert partial.missing() == [Slot(0, 2)]
    assert partial.servers == ("a", "b")


def test_a_slot_map_has_a_column_for_each_expert_and_leaves_out_what_the_model_lacks() -> None:
    spec = _spec(2, layers=2)  # and a shared expert, 2
    held = {"b": [Slot(0, 2), Slot(1, 0)], "a": [Slot(0, 3), Slot(0, -1), Slot(7, 0), Slot(0, 1)]}

    slot_map = SlotMap.of(3, spec, held, {"a": 2.5})

    assert slot_map.epoch == 3
    assert slot_map.rates == {"a": 2.5}
    assert {layer: table.tolist() for layer, table in slot_map.holds.items()} == {
        0: [[False, True, False], [False, False, True]],
        1: [[False, False, False], [True, False, False]],
    }
    assert {str(table.dtype) for table in slot_map.holds.values()} == {"bool"}
    assert slot_map.missing() == [Slot(0, 0), Slot(1, 1), Slot(1, 2)]


def test_a_slot_map_without_rates_has_none() -> None:
    assert SlotMap.of(1, _spec(2), {}).rates == {}
