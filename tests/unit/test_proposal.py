"""What `expertmesh plan` would change in a cluster, from a survey of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from expertmesh.errors import ConfigError
from expertmesh.info import LayerInfo, MeshInfo
from fleet.proposal import propose
from fleet.survey import Survey, SurveyedServer


def _survey(
    counts: Mapping[int, Sequence[int]],
    holds: Mapping[str, Mapping[int, set[int]]],
    not_ready: Sequence[str] = (),
) -> Survey:
    """Layers of as many experts as they have counts; layer 0 is dense."""
    moe = tuple(LayerInfo(layer, "moe", len(each), 2, True) for layer, each in counts.items())
    dense = LayerInfo(0, "dense", 0, 0, True)
    info = MeshInfo("t", 8, torch.float32, (dense, *moe), "digest", ())
    servers = tuple(
        SurveyedServer(
            name=name,
            node="n",
            state="lost" if name in not_ready else "ready",
            holds={} if name in not_ready else {k: frozenset(v) for k, v in held.items()},
            slot_bytes=1e6,
        )
        for name, held in holds.items()
    )
    totals = {layer: np.array(each, np.int64) for layer, each in counts.items()}
    return Survey(info=info, servers=servers, counts=totals, window_s=0.0, epoch=3, controller="")


_TWO = {"a": {1: {0, 1, 4}}, "b": {1: {2, 3, 4}}}  # four experts, and the shared one on both


def test_an_uneven_layer_is_evened_and_the_reason_is_the_hottest_expert() -> None:
    proposal = propose(_survey({1: [60, 20, 10, 10]}, _TWO), redundant=2)

    (layer,) = proposal.layers
    assert layer.maxvio_before == pytest.approx(0.6)  # a has 80 of 100
    assert layer.maxvio_after == pytest.approx(0.0, abs=1e-6)
    assert (layer.busiest, layer.hottest) == ("a", ((0, 0.75), (1, 0.25)))
    assert {move.layer for move in layer.moves} == {1}
    assert proposal.load_bytes == layer.loads * 1e6
    assert proposal.counted == 100


def test_redundant_slots_are_as_many_as_there_are_unless_others_are_asked_for() -> None:
    holds = {"a": {1: {0, 1, 2}}, "b": {1: {2, 3, 0}}}
    seen = _survey({1: [60, 20, 10, 10]}, holds)

    assert propose(seen).redundant == 2
    assert propose(seen, redundant=0).redundant == 0


def test_an_even_cluster_is_left_alone() -> None:
    proposal = propose(_survey({1: [25, 25, 25, 25]}, _TWO))

    assert proposal.layers[0].moves == ()


def test_a_cluster_that_has_counted_nothing_is_left_alone() -> None:
    proposal = propose(_survey({1: [0, 0, 0, 0]}, _TWO))

    assert proposal.layers[0].moves == ()
    assert proposal.layers[0].hottest == ()
    assert proposal.counted == 0


def test_experts_of_a_lost_server_are_loaded_elsewhere() -> None:
    holds = {"a": {1: {0, 1}}, "b": {1: {2, 3}}, "c": {1: {0, 1}}}

    proposal = propose(_survey({1: [25, 25, 25, 25]}, holds, not_ready=["b"]))

    (layer,) = proposal.layers
    assert layer.maxvio_before == float("inf")
    assert {move.expert for move in layer.moves if move.action == "load"} >= {2, 3}
    assert proposal.without == ("b",)


def test_no_server_is_given_more_slots_than_it_has_or_than_an_even_share() -> None:
    holds = {"a": {1: {0, 1, 2}}, "b": {1: {3}}}

    proposal = propose(_survey({1: [1, 1, 1, 97]}, holds))

    held = {name: set(each[1]) for name, each in holds.items()}
    for move in proposal.layers[0].moves:
        (held[move.server].add if move.action == "load" else held[move.server].discard)(move.expert)
    assert len(held["a"]) <= 3
    assert len(held["b"]) <= 2


def test_layers_with_other_numbers_of_experts_are_planned_apart() -> None:
    holds = {"a": {1: {0, 1}, 2: {0}}, "b": {1: {2, 3}, 2: {1}}}

    proposal = propose(_survey({1: [60, 20, 10, 10], 2: [9, 1]}, holds), redundant=0)

    assert [layer.layer for layer in proposal.layers] == [1, 2]
    assert proposal.layers[0].maxvio_after < proposal.layers[0].maxvio_before


def test_a_cluster_without_ready_servers_or_moe_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no expert server is ready"):
        propose(_survey({1: [1, 1, 1, 1]}, _TWO, not_ready=["a", "b"]))
    with pytest.raises(ConfigError, match="no MoE layer"):
        propose(_survey({}, {"a": {0: {0}}}))
