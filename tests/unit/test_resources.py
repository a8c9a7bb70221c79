"""What expert servers ask of Ray."""

from __future__ import annotations

import pytest
import torch

from expertmesh.errors import ConfigError
from expertmesh.model import GateSpec, LayerSpec, ModelSpec
from expertmesh.placement import initial_parts
from fleet.resources import Node, plan_request

# 64 experts of 3 GiB: more than any host here can hold, one at a time excepted.
LAYER = LayerSpec(
    index=0,
    num_experts=64,
    intermediate_size=1 << 16,
    shared_intermediate_size=0,
    gate=GateSpec(score="softmax", top_k=2),
)
SPEC = ModelSpec(model_type="test", hidden_size=1 << 13, dtype=torch.bfloat16, layers=(LAYER,))


def _node(name: str, cpus: float, gpus: float) -> Node:
    return Node(name, cpus=cpus, memory_bytes=64 << 30, gpus=gpus)


def test_a_server_on_a_gpu_needs_host_memory_for_one_expert_at_a_time() -> None:
    request = plan_request(
        [_node("a", 16, 2)], initial_parts(SPEC, 2), 1, SPEC, torch.bfloat16, "cuda"
    )

    assert request.gpus == 1.0
    assert request.memory_bytes == int(3 * 2**30 * 1.3) + (5 << 29)


def test_the_same_shard_does_not_fit_a_host_without_gpus() -> None:
    with pytest.raises(ConfigError, match=r"a shard of 96\.0 GiB .* do not fit on a: 64\.0 GiB"):
        plan_request([_node("a", 16, 0)], initial_parts(SPEC, 2), 1, SPEC, torch.bfloat16, "cpu")


def test_more_servers_than_gpus_get_equal_fractions() -> None:
    request = plan_request(
        [_node("a", 16, 2)], initial_parts(SPEC, 4), 1, SPEC, torch.bfloat16, "cuda"
    )

    assert request.gpus == 0.5


def test_cpus_are_shared_on_the_nodes_that_have_the_gpus() -> None:
    nodes = [_node("a", 8, 2), _node("b", 64, 0)]

    request = plan_request(nodes, initial_parts(SPEC, 2), 1, SPEC, torch.bfloat16, "cuda", 0)

    assert request.cpus == 3.6  # half of 90 % of 8
