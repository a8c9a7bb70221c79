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
