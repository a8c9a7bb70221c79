"""What a family takes for a key that config.json leaves out is what transformers takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from expertmesh.checkpoint import FAMILIES
from expertmesh.checkpoint.config import Config
from expertmesh.checkpoint.family import Family
from tests.checkpoints import build_config
from tests.family_keys import keys_read, other_values

#: Keys of checkpoints that transformers' configuration does not have, and what its models do.
UNKNOWN_TO_TRANSFORMERS: Mapping[str, object] = {
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "scoring_func": None,
    "topk_method": None,
}


def wrong_defaults(family: Family, keys: set[str]) -> dict[str, tuple[object, object]]:
    """Key → (our default, transformers'), where the two differ."""
    model_type = "deepseek_v3" if family.model_type == "kimi_k2" else family.model_type
    theirs = AutoConfig.for_model(model_type)
    ours = Config(Path("config.json"), {}, family.defaults)
    found = {}
    for key in keys | set(family.defaults):
        known = hasattr(theirs, key)
        expected = getattr(theirs, key) if known else UNKNOWN_TO_TRANSFORMERS[key]
        if ours.get(key) != expected:
            found[key] = (ours.get(key), expected)
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_default_of_a_family_is_the_one_of_transformers(model_type: str) -> None:
    family = FAMILIES[model_type]
    keys = keys_read(family, build_config(model_type).to_dict())

    assert {"hidden_size", "num_hidden_layers", "hidden_act", family.num_experts_key} <= keys
    assert wrong_defaults(family, keys) == {}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_default_that_is_changed_by_hand_is_noticed(model_type: str) -> None:
    family = FAMILIES[model_type]

    for key, value in family.defaults.items():
        for other in other_values(value):
            changed = replace(family, defaults={**family.defaults, key: other})
            assert set(wrong_defaults(changed, set())) == {key}
