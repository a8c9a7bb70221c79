"""The names and calls that users and checks rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import expertmesh
from expertmesh import BalanceConfig, MeshError


def _positional(function: Callable[..., Any]) -> dict[str, Any]:
    """Name → default of what can be given by position; `...` where there is no default."""
    return {
        each.name: ... if each.default is each.empty else each.default
        for each in inspect.signature(function).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD
    }


def test_the_package_exports_its_client_its_configuration_and_its_errors() -> None:
    client = {"AsyncMesh", "LayerInfo", "Mesh", "MeshInfo", "MeshLoad", "connect", "connect_async"}
    errors = {
        name
        for name, value in vars(expertmesh.errors).items()
        if isinstance(value, type) and issubclass(value, MeshError)
    }

    assert sorted(expertmesh.__all__) == sorted(errors | client | {"BalanceConfig"})


def test_a_client_loads_nothing_that_only_servers_need() -> None:
    servers = ("prometheus_client", "grpc_health.v1", "grpc_reflection.v1alpha", "ray", "llvmlite")
    code = f"import sys, expertmesh; print([m for m in {servers} if m in sys.modules])"

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert ran.stdout == "[]\n", ran.stderr


def test_launch_takes_what_the_design_says() -> None:
    from fleet import launch

    assert _positional(launch) == {
        "checkpoint": ...,
        "shards": 2,
        "replicas": 1,
        "device": "auto",
        "dtype": "auto",
        "ray_address": None,
        "port": 0,
        "balance": "frozen",
    }


def test_attach_takes_a_model_an_address_and_who_gates() -> None:
    from expertmesh.huggingface import attach, load_without_experts

    first_three = list(_positional(attach).items())[:3]
    assert first_three == [("model", ...), ("address", ...), ("gate", "cluster")]
    inspect.signature(attach).bind("model", "address")
    assert list(_positional(load_without_experts))[:2] == ["path", "address"]


def test_the_actor_has_its_name() -> None:
    from expert_service.actor import ExpertServerActor

    assert hasattr(ExpertServerActor, "remote")


@pytest.mark.parametrize("mesh", [expertmesh.Mesh, expertmesh.AsyncMesh])
def test_a_mesh_describes_forwards_and_counts(mesh: Any) -> None:
    inspect.signature(mesh.describe).bind("self")
    inspect.signature(mesh.load).bind("self")
    forward = inspect.signature(mesh.forward)
    forward.bind("self", "hidden", layer=3, timeout=30.0)
    forward.bind("self", "hidden", layer=3, expert_ids="ids", expert_weights="weights")


@pytest.mark.parametrize("connect", [expertmesh.connect, expertmesh.connect_async])
def test_connecting_takes_an_address(connect: Callable[..., Any]) -> None:
    inspect.signature(connect).bind("host:port")


def test_balance_has_the_fields_of_the_design_and_is_frozen_unless_asked() -> None:
    fields = {
        "mode",
        "policy",
        "update_rate",
        "window_tokens",
        "window_s",
        "max_delta",
        "divergence_ceiling",
    }

    assert set(inspect.signature(BalanceConfig).parameters) >= fields
    assert BalanceConfig().mode == "frozen"
