"""Is the model at hand the one that the cluster serves? Compared by configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from expertmesh.checkpoint import FAMILIES
from expertmesh.checkpoint.config import Config
from expertmesh.errors import ConfigError, MismatchError
from expertmesh.info import LayerInfo, MeshInfo
from expertmesh.model import GateSpec

#: Model types whose models transformers builds with the classes of another type.
SAME_CLASSES = {"kimi_k2": "deepseek_v3"}


def check_gate(gate: str) -> None:
    """Refuses anything but the two who can gate."""
    if gate not in ("cluster", "model"):
        raise ConfigError(f"gate is {gate!r}, expected 'cluster' or 'model'")


def check_family(model_type: object) -> str:
    """The model type, if models of it are served."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type is {model_type!r}, whose feed-forward layers are not served; served are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return str(model_type)


def check_model(config: Any, info: MeshInfo, gate: str) -> None:
    """Refuses a transformers configuration that differs from what the cluster serves.

    Every setting that experts or gates take from the configuration is compared, whoever gates: a
    model that differs in one is most likely not the one that was meant.
    """
    model_type = check_family(config.model_type)
    if transformers_type(model_type) != transformers_type(info.model_type):
        raise _mismatch("model_type", model_type, info.model_type)
    family = FAMILIES[model_type]
    values = Config(Path(f"the model's {type(config).__name__}"), config.to_dict(), family.defaults)
    if values.size("hidden_size") != info.hidden_size:
        raise _mismatch("hidden_size", values.size("hidden_size"), info.hidden_size)
    count = values.size("num_hidden_layers")
    if count != len(info.layers):
        raise _mismatch("num_hidden_layers", count, len(info.layers))
    for served in info.layers:
        _check_is_described(served)
        own = LayerInfo.of(family.layer_spec(values, served.index))
        for name, ours, theirs in differences(own, served):
            raise _mismatch(f"{name} of layer {served.index}", ours, theirs)
    values.expect(family.expects)
    if gate == "cluster" and getattr(config, "output_router_logits", False):
        raise ConfigError(
            "config.output_router_logits is True, but with gate='cluster' the model has no router: "
            "set it to False, or use gate='model'"
        )


def transformers_type(model_type: str) -> str:
    """The model type by which transformers knows the classes."""
    return SAME_CLASSES.get(model_type, model_type)


def differences(own: LayerInfo, served: LayerInfo) -> Iterator[tuple[str, object, object]]:
    """Name and both values of everything in which two layers differ."""
    for field in fields(LayerInfo):
        ours, theirs = getattr(own, field.name), getattr(served, field.name)
        if field.name != "gate" and ours != theirs:
            yield field.name, ours, theirs
    for field in fields(GateSpec):
        ours, theirs = getattr(own.gate, field.name, None), getattr(served.gate, field.name, None)
        if ours != theirs:
            yield f"gate.{field.name}", ours, theirs


def _check_is_described(served: LayerInfo) -> None:
    """Refuses a router that does not say what there is to compare."""
    if not served.activation:
        raise MismatchError(
            "the router at this address is of an earlier release, which does not say how its "
            "model gates and how wide its experts are: whether this model is the same cannot be "
            "checked. Install the same release of expertmesh on both sides"
        )


def _mismatch(what: str, ours: object, theirs: object) -> MismatchError:
    return MismatchError(
        f"{what} is {ours!r} in the model and {theirs!r} in the cluster: attach the model that the "
        "cluster serves, or give the address of the cluster that serves this one"
    )
