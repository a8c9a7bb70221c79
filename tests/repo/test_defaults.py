"""No tensor of ours is made where, or of what, the caller's defaults say.

`torch.device("meta")` around a client, or `torch.set_default_device("cuda")` and
`torch.set_default_dtype(torch.float64)` in its program, are the caller's own business.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

ROOT = Path(__file__).parents[2]
FOLDERS = ("expertmesh", "router_service", "expert_service", "load_controller")
#: Functions that make a tensor on the default device unless they are told another one.
MAKES = {function.__name__ for function in _device_constructors()}
#: Those whose type is not the default one, or is that of what they are given.
TYPED = {"arange", "as_tensor", "asarray", "randint", "randperm", "range", "tensor",
         "tril_indices", "triu_indices"}  # fmt: skip


def _calls() -> list[tuple[str, ast.Call, str]]:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            if where.startswith("expertmesh/v1/"):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                function = node.func if isinstance(node, ast.Call) else None
                if (
                    isinstance(node, ast.Call)
                    and isinstance(function, ast.Attribute)
                    and isinstance(function.value, ast.Name)
                    and function.value.id == "torch"
                    and function.attr in MAKES
                ):
                    found.append((where, node, function.attr))
    return found


def _says(call: ast.Call, name: str) -> bool:
    return any(keyword.arg == name for keyword in call.keywords)


def test_calls_are_found() -> None:
    assert {name for _, _, name in _calls()} >= {"empty", "zeros", "tensor", "arange"}


@pytest.mark.parametrize(("argument", "but"), [("device", set()), ("dtype", TYPED)])
def test_every_tensor_that_is_made_says_where_and_of_what(argument: str, but: set[str]) -> None:
    silent = [
        f"{where}:{call.lineno} torch.{name}"
        for where, call, name in _calls()
        if name not in but and not _says(call, argument)
    ]

    assert silent == []
