"""Every gRPC channel of ours is opened in one place, which says how: directly, past any proxy."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("expertmesh", "router_service", "expert_service", "load_controller", "fleet", "examples")
OPENS = {"insecure_channel", "secure_channel", "intercept_channel"}
# What asks the environment for proxies before it connects.
ASKS_FOR_PROXIES = {"urllib.request", "http.client", "requests", "httpx", "aiohttp", "websockets"}
PLACE = "expertmesh/rpc/channel.py"


def _nodes() -> list[tuple[str, ast.AST]]:
    return [
        (path.relative_to(ROOT).as_posix(), node)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "expertmesh/v1" not in path.as_posix()
        for node in ast.walk(ast.parse(path.read_text()))
    ]


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


@pytest.mark.slow
def test_channels_are_opened_in_one_place() -> None:
    openers = {
        file
        for file, node in _nodes()
        if (isinstance(node, ast.Attribute) and node.attr in OPENS)
        or any(name.rpartition(".")[2] in OPENS for name in _imported(node))
    }

    assert openers == {PLACE}


@pytest.mark.slow
def test_nobody_imports_a_client_that_follows_the_proxies_of_the_environment() -> None:
    users = {
        (file, name)
        for file, node in _nodes()
        for name in _imported(node)
        if any(name == each or name.startswith(each + ".") for each in ASKS_FOR_PROXIES)
    }

    assert users == set()
