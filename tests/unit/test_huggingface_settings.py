"""A model attaches only if every setting of its feed-forward layers is the cluster's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from expertmesh.checkpoint import FAMILIES
from expertmesh.checkpoint.config import Config
from expertmesh.errors import MeshError, MismatchError
from expertmesh.huggingface.matching import check_model, differences
from expertmesh.info import LayerInfo, MeshInfo, layer_message, layer_of
from expertmesh.model import GateSpec, LayerSpec
from expertmesh.v1 import router_pb2 as pb
from tests.checkpoints import build_config
from tests.family_keys import keys_read, other_values

# Keys that only say something where another one is set: they change nothing here.
WITHOUT_EFFECT = {("deepseek_v2", "greedy", "n_group"), ("deepseek_v2", "greedy", "topk_group")}

both_gates = pytest.mark.parametrize("gate", ["cluster", "model"])


def described(config: PretrainedConfig, model_type: str) -> MeshInfo:
    """What a client is told by a cluster that serves the model of this configuration."""
    family = FAMILIES[model_type]
    values = Config(Path("config.json"), config.to_dict(), family.defaults)
    specs = [family.layer_spec(values, index) for index in range(config.num_hidden_layers)]
    layers = tuple(layer_of(over_the_wire(LayerInfo.of(spec))) for spec in specs)
    return MeshInfo(model_type, config.hidden_size, torch.float32, layers, "digest", ())


def over_the_wire(layer: LayerInfo) -> pb.Layer:
    return pb.Layer.FromString(layer_message(layer).SerializeToString())


def changes(model_type: str) -> Iterator[tuple[str, object]]:
    """Every key that the family reads, with each of its other values."""
    config = build_config(model_type)
    family = FAMILIES[model_type]
    values = Config(Path("config.json"), config.to_dict(), family.defaults)
    for key in sorted(keys_read(family, config.to_dict())):
        if (model_type, values.get("topk_method"), key) in WITHOUT_EFFECT:
            continue
        value = values.get(key)
        for other in other_values("" if value is None else value):
            yield key, other


@both_gates
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_model_that_is_served_attaches(model_type: str, gate: str) -> None:
    config = build_config(model_type)

    check_model(config, described(config, model_type), gate)


@both_gates
@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_model_attaches_that_differs_in_one_setting(model_type: str, gate: str) -> None:
    info = described(build_config(model_type), model_type)
    tried = list(changes(model_type))

    silent = []
    for key, other in tried:
        config = build_config(model_type)
        setattr(config, key, other)
        try:
            check_model(config, info, gate)
        except MeshError:
            continue
        silent.append((key, other))

    assert silent == []
    keys = {key for key, _ in tried}
    assert {"hidden_size", "num_hidden_layers", "hidden_act", "num_experts_per_tok"} <= keys


@pytest.mark.parametrize(
    ("model_type", "key", "value", "says"),
    [
        ("qwen3_moe", "norm_topk_prob", False, "renormalize of layer 1 is False in the model"),
        ("deepseek_v3", "routed_scaling_factor", 1.8, "scale of layer 1 is 1.8 in the model"),
        ("deepseek_v3", "n_group", 2, "n_group of layer 1 is 2 in the model and 4"),
        ("deepseek_v3", "topk_group", 3, "topk_group of layer 1 is 3 in the model and 2"),
        ("deepseek_v3", "moe_intermediate_size", 16, "intermediate_size of layer 1 is 16"),
        ("mixtral", "hidden_act", "gelu", "activation of layer 0 is 'gelu' in the model"),
        ("qwen2_moe", "shared_expert_intermediate_size", 0, "has_shared_expert of layer 0"),
        ("deepseek_v3", "n_shared_experts", 2, "shared_intermediate_size of layer 1 is 64"),
    ],
)
def test_the_setting_is_named_with_both_values(
    model_type: str, key: str, value: object, says: str
) -> None:
    config = build_config(model_type)
    info = described(config, model_type)
    setattr(config, key, value)

    with pytest.raises(MismatchError, match=says):
        check_model(config, info, "cluster")


GATE = GateSpec(
    score="sigmoid",
    top_k=4,
    n_group=8,
    topk_group=3,
    group_score="top2_sum",
    renormalize=True,
    renormalize_eps=1e-20,
    scale=2.5,
    logits_float32=True,
    round_weights=True,
)
MOE = LayerSpec(
    index=5,
    num_experts=64,
    intermediate_size=48,
    shared_intermediate_size=96,
    shared_gated=True,
    gate=GATE,
    activation="silu",
)
DENSE = LayerSpec(index=0, num_experts=0, intermediate_size=0, shared_intermediate_size=32)


@pytest.mark.parametrize("spec", [MOE, DENSE], ids=["moe", "dense"])
def test_what_a_layer_is_reaches_the_client_whole(spec: LayerSpec) -> None:
    info = LayerInfo.of(spec)

    assert layer_of(over_the_wire(info)) == info


@pytest.mark.parametrize("name", [each.name for each in fields(GateSpec)])
def test_every_setting_of_a_gate_reaches_the_client_and_is_compared(name: str) -> None:
    value = getattr(GATE, name)
    other: Any = {"sigmoid": "softmax", "top2_sum": "max"}.get(value) or next(other_values(value))
    info = LayerInfo.of(replace(MOE, gate=replace(GATE, **{name: other})))
    served = layer_of(over_the_wire(LayerInfo.of(MOE)))

    assert layer_of(over_the_wire(info)) == info
    assert (f"gate.{name}", other, value) in set(differences(info, served))


@pytest.mark.parametrize("name", [each.name for each in fields(LayerInfo) if each.name != "gate"])
def test_every_property_of_a_layer_reaches_the_client_and_is_compared(name: str) -> None:
    served = layer_of(over_the_wire(LayerInfo.of(MOE)))
    value = getattr(served, name)
    other: Any = "dense" if name == "kind" else next(other_values(value))
    own = layer_of(over_the_wire(replace(served, **{name: other})))

    assert (name, other, value) in set(differences(own, served))


def test_a_router_that_does_not_say_enough_is_refused() -> None:
    config = build_config("deepseek_v3")
    info = described(config, "deepseek_v3")
    old = [
        pb.Layer(
            index=layer.index,
            kind=layer_message(layer).kind,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            has_shared_expert=layer.has_shared_expert,
        )
        for layer in info.layers
    ]

    with pytest.raises(MismatchError, match=r"earlier release.*same release of expertmesh on both"):
        check_model(config, replace(info, layers=tuple(map(layer_of, old))), "cluster")
