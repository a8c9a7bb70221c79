"""Metrics without a network: what a histogram counts, and how many series a large model makes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

import expert_service.metrics
import load_controller.metrics
import router_service.metrics
from expert_service.kernels.reference import ReferenceBackend
from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard
from expertmesh.codec.messages import ExecuteRequest
from expertmesh.config import BalanceConfig, ExpertConfig, RouterConfig, RpcConfig
from expertmesh.model import PROTOCOL_VERSION, ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot
from expertmesh.rpc.admission import Admission
from expertmesh.rpc.deadline import Deadline
from expertmesh.telemetry.exposition import families
from expertmesh.telemetry.metric import Histogram, Metric, Reading
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import expert_pb2, router_pb2
from load_controller.controller import LoadController
from load_controller.store import Store
from router_service.controller_link import ControllerLink
from router_service.pool import ExpertPool
from router_service.router import Router
from router_service.snapshot import Model
from tests.scrape import Scrape, parse

LAYERS, EXPERTS, SERVERS = 58, 256, 32
SPEC = ModelSpec(
    model_type="test",
    hidden_size=2,
    dtype=torch.float32,
    layers=tuple(
        LayerSpec(
            index=index,
            num_experts=EXPERTS,
            intermediate_size=1,
            shared_intermediate_size=1,
            gate=GateSpec(score="sigmoid", top_k=8),
        )
        for index in range(LAYERS)
    ),
)


def _scrape(readings: Iterable[Reading]) -> Scrape:
    """The readings, written out and read in again."""

    class Fixed(Collector):
        def collect(self):  # type: ignore[no-untyped-def]
            return families(list(readings))

    registry = CollectorRegistry()
    registry.register(Fixed())
    return parse(generate_latest(registry).decode())


def test_a_histogram_counts_a_value_at_the_first_bound_that_is_not_below_it() -> None:
    histogram = Histogram((1.0, 2.5))
    for value in (0.5, 1.0, 1.5, 2.5, 99.0):
        histogram.observe(value)

    assert histogram.cumulative() == [("1.0", 2.0), ("2.5", 4.0), ("+Inf", 5.0)]
    assert histogram.total == 104.5


def test_readings_come_out_as_prometheus_writes_them() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.25)
    asked = Metric("a_total", "counter", "Asked", ("how",))

    seen = _scrape(
        [
            asked.of(3, "OK"),
            Metric("b", "gauge", "Gauged").of(True),
            asked.of(1, "BAD"),
            Metric("c_seconds", "histogram", "Took").of(histogram),
        ]
    )

    assert seen.value("a_total", how="OK") == 3
    assert seen.value("a_total", how="BAD") == 1
    assert seen.value("b") == 1
    assert seen.value("c_seconds_bucket", le="1.0") == 1
    assert seen.value("c_seconds_bucket", le="+Inf") == 1
    assert seen.value("c_seconds_sum") == 0.25
    assert {name: family.kind for name, family in seen.families.items()} == {
        "a_total": "counter",
        "b": "gauge",
        "c_seconds": "histogram",
    }


def test_the_controllers_series_grow_with_layers_and_not_with_experts() -> None:
    controller = LoadController(
        Store(":memory:"), BalanceConfig(mode="adaptive", window_tokens=1), lambda: None
    )
    counts = np.arange(EXPERTS).tolist()
    every = range(LAYERS)
    for server in range(SERVERS):
        controller.announce(_announcement(f"s{server}"), now=0.0)
    controller.take_assignments(
        pb.ReportAssignmentsRequest(
            source="r",
            incarnation="i",
            sequence=1,
            layers=[
                router_pb2.LayerLoad(
                    layer=layer, counts=counts, caller_gated_counts=counts, top_k=8
                )
                for layer in every
            ],
        ),
        now=1.0,
    )
    while controller.close_windows(now=1.0):
        pass  # a turn closes some of what is due
    controller.take_executions(
        pb.ReportExecutionsRequest(
            source="s",
            incarnation="i",
            sequence=1,
            layers=[pb.LayerExecutions(layer=layer, counts=counts) for layer in every],
        )
    )

    seen = _scrape(load_controller.metrics.read(controller, pb.RebalanceReport(), 0, 0.0, 0.1))

    assert seen.value("expertmesh_controller_assignments_total", layer="57") == 2 * sum(counts)
    assert seen.value("expertmesh_controller_windows_closed_total") == LAYERS
    assert seen.value("expertmesh_controller_window_maxvio", layer="0") == pytest.approx(1.0)
    assert seen.series <= 4 * LAYERS + 40  # docs/operations.md


def _announcement(server: str) -> pb.AnnounceServerRequest:
    return pb.AnnounceServerRequest(
        server=router_pb2.ServerStatus(
            server_id=server, incarnation="i", endpoint="127.0.0.1:1", state="ready"
        ),
        protocol_version=PROTOCOL_VERSION,
        checkpoint_digest="digest",
        started_at_ns=1,
        layers=[expert_pb2.LayerSlots(layer=0, experts=[0])],
    )


def test_a_routers_series_grow_with_servers_and_with_nothing_else() -> None:
    async def read() -> Scrape:
        model = Model(SPEC, {}, "digest", torch.float32)
        router = Router(model, ExpertPool(model.digest, RouterConfig()), RouterConfig())
        router.pool.update([_announcement(f"s{index}").server for index in range(SERVERS)])
        link = ControllerLink(router, "r", "127.0.0.1:1", 1.0)
        try:
            return _scrape(router_service.metrics.read(router, link, Admission(RpcConfig()), {}))
        finally:
            await link.close()
            await router.close()

    seen = asyncio.run(read())

    assert seen.value("expertmesh_router_servers", state="ready") == SERVERS
    assert seen.value("expertmesh_router_experts_without_server") == LAYERS * (EXPERTS + 1)
    assert seen.value("expertmesh_router_ready") == 0
    assert seen.series <= 4 * SERVERS + 70  # docs/operations.md


def test_an_expert_servers_series_grow_with_its_layers() -> None:
    slots = [Slot(layer, 0) for layer in range(LAYERS)]
    shard = ExpertShard(SPEC, slots, ReferenceBackend())
    ones = ExpertWeights(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 1))
    shard.load(lambda slot: ones, lambda slot: None)

    async def read() -> Scrape:
        runner = DeviceRunner(shard, threads=1, config=ExpertConfig())
        request = ExecuteRequest(
            layer=3,
            hidden_states=torch.ones(5, 2),
            expert_ids=np.zeros((5, 1), np.int32),
            expert_weights=np.ones((5, 1), np.float32),
            epoch=1,
        )
        await runner.execute(request, Deadline.after(10.0))
        status = router_pb2.ServerStatus(server_id="s0", state="ready", backend="reference")
        readings = expert_service.metrics.read(status, shard, runner, Admission(RpcConfig()), {})
        seen = _scrape(readings)
        runner.close()
        return seen

    seen = asyncio.run(read())

    assert seen.value("expertmesh_expert_executions_total", layer="3") == 5
    assert seen.value("expertmesh_expert_rows_total") == 5
    assert seen.value("expertmesh_expert_compute_seconds_count") == 1
    assert seen.value("expertmesh_expert_state", state="ready") == 1
    assert seen.series <= LAYERS + 70  # docs/operations.md
