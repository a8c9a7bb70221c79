"""Does a model hold more in its feed-forward layers than its checkpoint? Attaching would drop it.

Adapters, hooks, parametrisations, quantised or pruned layers and patched methods are found by
comparing each layer with a twin: what transformers builds for the same configuration, without
storage. `weights.py` compares a few values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn

from expertmesh.errors import ConfigError
from expertmesh.huggingface.modules import BUILDING, PLACEHOLDERS

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Hooks that transformers installs by itself when outputs are asked for; idle otherwise.
_OUTPUT_CAPTURING = "transformers.utils.output_capturing"
_PLAIN = (bool, int, float, str, tuple, type(None))


def check_untouched(
    config: Any, decoder: Sequence[nn.Module], name: str, dropped: Sequence[Sequence[str]]
) -> None:
    """Refuses, by name, what attaching would drop without a word.

    `decoder` are the decoder layers, called `name`.0 and so on; `dropped[i]` are the parts of layer
    i that attaching replaces: a whole block, whose own hooks stay, or parts of a block that stays.
    """
    seen: dict[int, str] = {}
    for index, (layer, parts) in enumerate(zip(decoder, dropped, strict=True)):
        twin = _twin(layer, config, index)
        for part in parts:
            block, _, inner = part.partition(".")
            difference = next(
                chain(
                    _classes(layer.get_submodule(block), twin.get_submodule(block), block),
                    _differences(layer, twin, part, top=not inner),
                ),
                None,
            )
            if difference:
                raise ConfigError(
                    f"{name}.{index}.{difference}. The cluster computes this layer from its own "
                    "checkpoint, so what was put there would be lost: take it off, or merge it, "
                    "save the model and serve that checkpoint"
                )
            _check_owned_once(layer.get_submodule(part), f"{name}.{index}.{part}", seen)


def _twin(layer: nn.Module, config: Any, index: int) -> nn.Module:
    """The decoder layer as transformers builds it, on the meta device: nothing is allocated."""
    try:
        with BUILDING, torch.device("meta"):
            twin: nn.Module = type(layer)(config, index)
    except Exception as error:  # whatever a class of somebody else's makes of it
        raise ConfigError(
            f"decoder layer {index} is a {type(layer).__name__}, which cannot be built anew from "
            "the model's configuration, so whether its feed-forward part is the checkpoint's is "
            "not known: attach the model as transformers loads it"
        ) from error
    return twin


def _differences(layer: nn.Module, twin: nn.Module, path: str, top: bool) -> Iterator[str]:
    """What the part at `path` has that its twin's has not, in words, from the outside in."""
    module, expected = layer.get_submodule(path), twin.get_submodule(path)
    if isinstance(module, PLACEHOLDERS):  # of an attachment that was closed
        return
    yield from _classes(module, expected, path)
    yield from _patches(module, path, top)
    yield from _tensors(module, expected, path)
    for name, value in vars(expected).items():
        if name.startswith("_") or name == "training" or not isinstance(value, _PLAIN):
            continue
        if vars(module).get(name) != value:
            mine = vars(module).get(name)
            yield f"{path}.{name} is {mine!r}, the model's configuration says {value!r}"
    yield from _names(module._modules, expected._modules, path)
    for name in expected._modules:
        yield from _differences(layer, twin, f"{path}.{name}", top=False)


def _classes(module: nn.Module, expected: nn.Module, path: str) -> Iterator[str]:
    if type(module) is not type(expected) and not isinstance(module, PLACEHOLDERS):
        yield (
            f"{path} is a {type(module).__module__}.{type(module).__name__}, expected "
            f"{type(expected).__name__} by the model's configuration"
        )


def _names(mine: Mapping[str, object], expected: Mapping[str, object], path: str) -> Iterator[str]:
    """Names that one of the two has and the other has not; None counts as not there."""
    there = {name for name, value in mine.items() if value is not None}
    wanted = {name for name, value in expected.items() if value is not None}
    for name in sorted(there ^ wanted):
        has = "is there" if name in there else "is not there"
        yield f"{path}.{name} {has}, against the model's configuration"


def _patches(module: nn.Module, path: str, top: bool) -> Iterator[str]:
    """Methods and hooks that a module got after it was built."""
    if "forward" in vars(module) and not _only_places(vars(module).get("_hf_hook")):
        yield f"{path} has a forward of its own, which is not its class's"
    hooks = (hook for kind in _HOOKS for hook in getattr(module, kind).values())
    for hook in hooks:
        if not top and getattr(hook, "__module__", "") != _OUTPUT_CAPTURING:
            yield f"{path} has a hook ({getattr(hook, '__qualname__', hook)})"


def _only_places(hook: ModelHook | None) -> bool:
    """Whether accelerate's hook does no more than to bring weights and inputs to a device."""
    if isinstance(hook, SequentialHook):
        return all(_only_places(each) for each in hook.hooks)
    return type(hook) is AlignDevicesHook


def _tensors(module: nn.Module, expected: nn.Module, path: str) -> Iterator[str]:
    """Parameters and buffers of the module itself that are not those of its twin."""
    for kind in ("_parameters", "_buffers"):
        mine, wanted = getattr(module, kind), getattr(expected, kind)
        yield from _names(mine, wanted, path)
        for name, tensor in mine.items():
            if tensor is None:
                continue
            if tensor.shape != wanted[name].shape:
                yield (
                    f"{path}.{name} has shape {list(tensor.shape)}, the model's configuration "
                    f"says {list(wanted[name].shape)}"
                )
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                yield f"{path}.{name} is quantised to {tensor.dtype}"


def _check_owned_once(module: nn.Module, path: str, seen: dict[int, str]) -> None:
    """Refuses weights of two layers that are one: they are two in the checkpoint."""
    for name, parameter in module.named_parameters(prefix=path, remove_duplicate=False):
        other = seen.setdefault(id(parameter), name)
        if other != name:
            raise ConfigError(
                f"{name} is tied to {other}: they are two weights in the checkpoint, from which "
                "the cluster computes them"
            )
