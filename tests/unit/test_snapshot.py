"""Snapshots of bias and placement: newer ones replace older ones, never the other way."""

from __future__ import annotations

import torch

from expertmesh.model import GateSpec, GateWeights, LayerSpec, ModelSpec
from expertmesh.placement import SlotMap
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import expert_pb2
from router_service.snapshot import EpochsInUse, Model, Snapshot

SPEC = ModelSpec(
    model_type="t",
    hidden_size=4,
    dtype=torch.float32,
    layers=(
        LayerSpec(
            index=1,
            num_experts=3,
            intermediate_size=2,
            shared_intermediate_size=0,
            gate=GateSpec(score="sigmoid", top_k=1),
        ),
    ),
)
GATES = {1: GateWeights(torch.zeros(3, 4), torch.tensor([0.5, 0.0, -0.5]), None)}


def _bias(version: int, delta: list[float]) -> pb.BiasUpdate:
    return pb.BiasUpdate(
        version=version, mode="adaptive", layers=[pb.LayerBias(layer=1, delta=delta)]
    )


def _placement(epoch: int, server: str) -> pb.Placement:
    layers = [expert_pb2.LayerSlots(layer=1, experts=[0, 1, 2, 9]), expert_pb2.LayerSlots(layer=7)]
    return pb.Placement(epoch=epoch, servers=[pb.ServerSlots(server_id=server, layers=layers)])


def test_a_late_bias_push_does_not_replace_a_newer_one() -> None:
    newer = Snapshot(SlotMap(0, ())).with_bias(_bias(5, [1.0, 0.0, 0.0]), GATES)

    assert newer.with_bias(_bias(4, [9.0, 9.0, 9.0]), GATES) is newer
    assert newer.with_bias(_bias(5, [9.0, 9.0, 9.0]), GATES) is newer


def test_the_serving_bias_is_the_trained_one_plus_the_delta() -> None:
    snapshot = Snapshot(SlotMap(0, ())).with_bias(_bias(1, [1.0, 0.25, 0.0]), GATES)

    assert snapshot.biases[1].tolist() == [1.5, 0.25, -0.5]
    assert snapshot.biases[1].dtype == torch.float32
    assert (snapshot.bias_version, snapshot.mode) == (1, "adaptive")
    assert GATES[1].bias.tolist() == [0.5, 0.0, -0.5]


def test_a_delta_of_another_shape_is_left_out() -> None:
    snapshot = Snapshot(SlotMap(0, ())).with_bias(_bias(1, [1.0]), GATES)

    assert 1 not in snapshot.biases


def test_a_late_placement_does_not_replace_a_newer_one() -> None:
    newer = Snapshot(SlotMap(0, ())).with_placement(_placement(3, "new"), SPEC)

    assert newer.slots.servers == ("new",)
    assert newer.with_placement(_placement(2, "old"), SPEC) is newer
    assert newer.with_placement(_placement(3, "old"), SPEC) is newer


def test_slots_of_experts_that_the_model_does_not_have_are_left_out() -> None:
    slots = Snapshot(SlotMap(0, ())).with_placement(_placement(1, "s"), SPEC).slots

    assert slots.holds[1].tolist() == [[True, True, True]]


def test_the_oldest_epoch_is_that_of_a_batch_in_flight() -> None:
    epochs = EpochsInUse()

    epochs.begin(4)
    epochs.begin(6)
    both = epochs.oldest(7)
    epochs.end(4)
    later = epochs.oldest(7)
    epochs.end(6)

    assert (both, later, epochs.oldest(7)) == (4, 6, 7)


def test_a_placement_brings_the_rates_of_its_servers_and_1_where_it_names_none() -> None:
    placement = _placement(1, "fast")
    placement.servers[0].rate = 2.5
    placement.servers.append(pb.ServerSlots(server_id="old"))

    slots = Snapshot(SlotMap(0, ())).with_placement(placement, SPEC).slots

    assert slots.rates == {"fast": 2.5, "old": 1.0}


def test_an_epoch_is_in_use_until_the_last_of_its_batches_ends() -> None:
    epochs = EpochsInUse()

    for _ in range(3):
        epochs.begin(4)
    seen = []
    for _ in range(3):
        epochs.end(4)
        seen.append(epochs.oldest(7))

    assert seen == [4, 4, 7]


def test_a_model_knows_its_layers_by_index_and_no_others() -> None:
    model = Model(SPEC, GATES, "digest", torch.float32)

    assert model.layer(1) is SPEC.layers[0]
    assert model.layer(0) is None
