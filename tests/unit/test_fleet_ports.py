"""Which process serves its metrics where, and what a server asks for before there are nodes."""

from __future__ import annotations

import pytest
import torch

from expertmesh.errors import ConfigError
from expertmesh.model import LayerSpec, ModelSpec
from expertmesh.placement import initial_parts
from fleet.ports import metrics_ports
from fleet.resources import fixed_request

SPEC = ModelSpec(
    model_type="test",
    hidden_size=1 << 10,
    dtype=torch.float32,
    layers=(
        LayerSpec(index=0, num_experts=4, intermediate_size=1 << 10, shared_intermediate_size=0),
    ),
)


def test_processes_of_one_machine_take_one_port_after_the_other() -> None:
    ports = metrics_ports(9464, services=2, servers=3, node_each=False)

    assert ports.services == (9464, 9465)
    assert ports.servers == (9466, 9467, 9468)


def test_servers_with_a_node_each_take_the_same_port_and_leave_it_to_no_service() -> None:
    ports = metrics_ports(9464, services=2, servers=3, node_each=True)

    assert ports.servers == (9464, 9464, 9464)
    assert ports.services == (9465, 9466)


@pytest.mark.parametrize("port", [0, None])
def test_any_port_and_no_metrics_are_the_same_for_everyone(port: int | None) -> None:
    ports = metrics_ports(port, services=2, servers=2, node_each=False)

    assert ports.services == ports.servers == (port, port)


@pytest.mark.parametrize("port", [-1, 65534, 70000])
def test_ports_that_do_not_exist_are_refused(port: int) -> None:
    with pytest.raises(ConfigError, match=f"metrics_port is {port}, expected 0 to 65531"):
        metrics_ports(port, services=2, servers=3, node_each=False)


def test_a_fixed_request_needs_no_nodes() -> None:
    request = fixed_request(8, initial_parts(SPEC, 2), SPEC, torch.float32, "cpu")

    weights = 3 * 2 * (1 << 20) * 4
    assert request.memory_bytes == int(weights * 1.3) + (512 << 20)
    assert (request.cpus, request.threads, request.gpus, request.expert_slots) == (8, 8, 0, 1)


def test_a_fixed_request_on_cuda_takes_a_whole_gpu() -> None:
    request = fixed_request(0.5, initial_parts(SPEC, 2), SPEC, torch.float32, "cuda")

    assert (request.threads, request.gpus) == (1, 1)


@pytest.mark.parametrize("cpus", [0, -1, float("nan")])
def test_servers_without_cpus_are_refused(cpus: float) -> None:
    with pytest.raises(ConfigError, match="cpus_per_server"):
        fixed_request(cpus, initial_parts(SPEC, 2), SPEC, torch.float32, "cpu")
