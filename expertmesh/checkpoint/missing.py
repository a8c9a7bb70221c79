"""Why a tensor is missing, as far as the names of the others tell."""

from __future__ import annotations

import re
from collections.abc import Iterable

from expertmesh.checkpoint.config import Config

_SERVED = "float32, float16, bfloat16 and FP8 in blocks are served"


def explain(name: str, stored: Iterable[str], config: Config) -> str:
    """What to say after "NAME is missing", and what to do about it; "" when nothing is known.

    `stored` are the names of all tensors that the checkpoint lists.
    """
    names = sorted(stored)
    for found in (_stacked(name, names), _quantised(name, names), _null(name, config)):
        if found:
            return found
    return _elsewhere(name, names)


def _stacked(name: str, names: list[str]) -> str:
    """All experts of a layer in one tensor: `experts.gate_up_proj` and the like."""
    block, experts, _ = name.partition(".experts.")
    found = next(
        (each for each in names if re.match(re.escape(block) + r"\.experts\.\D", each)), ""
    )
    if not experts or not found:
        return ""
    return (
        f": the experts of this layer are stacked, as in {found}, a layout that is not served. "
        "Save the checkpoint with tensors of its own for each expert, as save_pretrained of "
        "transformers does unless save_original_format=False"
    )


def _quantised(name: str, names: list[str]) -> str:
    """`qweight` of GPTQ, `weight_packed` of compressed-tensors, `weight_blocks` and the like."""
    module = name.removesuffix("weight")
    found = [each.removeprefix(module) for each in names if each.startswith(module)]
    if not name.endswith(".weight") or not found:
        return ""
    return f": it is stored as {', '.join(found)}, a quantised format that is not served; {_SERVED}"


def _null(name: str, config: Config) -> str:
    """A shared expert that config.json neither names nor denies."""
    if ".shared_expert" not in name or config.values.get("n_shared_experts") is not None:
        return ""
    if "n_shared_experts" not in config.defaults:
        return ""
    says = "is null" if "n_shared_experts" in config.values else "is not there"
    default = config.get("n_shared_experts")
    return (
        f": n_shared_experts {says} in {config.path.name}, which stands for this family's {default}"
        ". Write 0 there if the model has no shared experts"
    )


def _elsewhere(name: str, names: list[str]) -> str:
    """The same tensor below another prefix: a language model within a larger one."""
    short = name.removeprefix("model.")
    found = next((each for each in names if each.endswith("." + short)), "")
    return f": it is called {found}, a layout that is not served" if found else ""
