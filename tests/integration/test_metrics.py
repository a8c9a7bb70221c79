"""`/metrics` of running services, after traffic that is known."""

from __future__ import annotations

import re
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

import expertmesh
from expertmesh.config import BalanceConfig, RebalanceConfig, RpcConfig
from expertmesh.rpc import loop
from expertmesh.rpc.deadline import Deadline
from expertmesh.v1 import router_pb2, router_pb2_grpc
from load_controller.metrics import ALIVE_WITHIN_S
from load_controller.server import ControllerServer
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.processes import Service
from tests.scrape import Scrape, scrape
from tests.wire import (
    RawStream,
    admission,
    channel_to,
    devices_held,
    forward,
    proto,
    wait_until_idle,
)

ROOT = Path(__file__).parents[2]
ROWS, REQUESTS = 7, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    return path


@pytest.fixture(scope="module")
def mesh(checkpoint: Path) -> Iterator[LocalMesh]:
    """Two shards that answered REQUESTS of ROWS rows in every layer, and refused one request."""
    balance = BalanceConfig(mode="adaptive", window_tokens=ROWS)
    looking = RebalanceConfig(
        window_s=0.1, half_life_windows=1e6, least_assignments=1, max_violation=1e6
    )
    with local_mesh(checkpoint, metrics=True, balance=balance, rebalance=looking) as running:
        with expertmesh.connect(running.address) as client:
            info = client.describe()
            for _ in range(REQUESTS):
                for layer in info.layers:
                    client.forward(torch.randn(ROWS, info.hidden_size), layer.index)
            with pytest.raises(expertmesh.UnknownLayerError):
                client.forward(torch.randn(ROWS, info.hidden_size), 99)
            client.load()  # the controller knows every answer now
        wait_until(lambda: _executed(running) > 0, 10.0, "told of executions")
        control = running.controller
        wait_until(
            lambda: control.rebalancing.report(0.0).layers, 10.0, "looked at for rebalancing"
        )
        yield running


def _executed(mesh: LocalMesh) -> float:
    family = scrape(mesh.controller.metrics_address).families.get(
        "expertmesh_controller_executions_total"
    )
    return sum(family.samples.values()) if family else 0


@pytest.fixture(scope="module")
def router(mesh: LocalMesh) -> Scrape:
    return scrape(mesh.routers[0].metrics_address)


@pytest.fixture(scope="module")
def experts(mesh: LocalMesh) -> list[Scrape]:
    return [scrape(server.metrics_address) for server in mesh.servers]


@pytest.fixture(scope="module")
def controller(mesh: LocalMesh) -> Scrape:
    return scrape(mesh.controller.metrics_address)


def _layers(mesh: LocalMesh) -> tuple[list[expertmesh.LayerInfo], list[expertmesh.LayerInfo]]:
    with expertmesh.connect(mesh.address) as client:
        layers = client.describe().layers
    return [x for x in layers if x.kind == "moe"], [x for x in layers if x.kind == "dense"]


def test_a_router_says_how_requests_ended_and_how_long_they_took(
    mesh: LocalMesh, router: Scrape
) -> None:
    moe, dense = _layers(mesh)
    answered = REQUESTS * (len(moe) + len(dense))

    assert moe
    assert dense
    assert router.value("expertmesh_router_requests_total", outcome="OK") == answered
    assert router.value("expertmesh_router_requests_total", outcome="UNKNOWN_LAYER") == 1
    assert router.value("expertmesh_router_requests_total", outcome="INTERNAL") == 0
    assert router.value("expertmesh_router_rows_total") == answered * ROWS
    for kind, layers in (("moe", moe), ("dense", dense)):
        count = router.value("expertmesh_router_request_seconds_count", kind=kind)
        assert count == REQUESTS * len(layers)
        assert router.value("expertmesh_router_request_seconds_sum", kind=kind) > 0


def test_a_router_at_rest_has_nothing_queued_and_knows_its_servers(router: Scrape) -> None:
    for gauge in ("queue_requests", "batches", "inflight_requests", "inflight_bytes"):
        assert router.value(f"expertmesh_router_{gauge}") == 0
    assert router.value("expertmesh_router_ready") == 1
    assert router.value("expertmesh_router_controller_connected") == 1
    assert router.value("expertmesh_router_experts_without_server") == 0
    assert router.value("expertmesh_router_servers", state="ready") == 2
    assert router.value("expertmesh_router_servers", state="lost") == 0
    for server in ("s0r0", "s1r0"):
        assert router.value("expertmesh_router_server_connected", server=server) == 1
        assert router.value("expertmesh_router_server_inflight_requests", server=server) == 0
        assert router.value("expertmesh_router_server_shared_memory", server=server) == 0
    assert router.value("expertmesh_router_shared_streams") == 0


def test_expert_servers_say_what_they_computed(mesh: LocalMesh, experts: list[Scrape]) -> None:
    moe, _ = _layers(mesh)

    for layer in moe:
        name, labels = "expertmesh_expert_executions_total", {"layer": str(layer.index)}
        pairs = sum(server.value(name, **labels) for server in experts)
        assert pairs == REQUESTS * ROWS * (layer.top_k + layer.has_shared_expert)
    for server, running in zip(experts, mesh.servers, strict=True):
        computed = server.value("expertmesh_expert_requests_total", outcome="OK")
        assert computed > 0
        assert server.value("expertmesh_expert_queue_seconds_count") == computed
        assert server.value("expertmesh_expert_compute_seconds_count") == computed
        assert server.value("expertmesh_expert_slots") == running.status().slots
        loaded = server.value("expertmesh_expert_loaded_bytes")
        assert loaded == server.value("expertmesh_expert_planned_bytes") > 0
        assert server.value("expertmesh_expert_state", state="ready") == 1
        assert server.value("expertmesh_expert_state", state="loading") == 0


def test_the_controller_says_what_was_counted_and_that_it_balances(
    mesh: LocalMesh, controller: Scrape, router: Scrape
) -> None:
    moe, _ = _layers(mesh)
    with expertmesh.connect(mesh.address) as client:
        load = client.load()

    for layer in moe:
        labels = {"layer": str(layer.index)}
        assigned = controller.value("expertmesh_controller_assignments_total", **labels)
        assert assigned == REQUESTS * ROWS * layer.top_k
        maxvio = controller.value("expertmesh_controller_maxvio", **labels)
        assert maxvio == pytest.approx(load.maxvio[layer.index])
        assert controller.value("expertmesh_controller_window_maxvio", **labels) > 0
    assert controller.value("expertmesh_controller_windows_closed_total") >= len(moe)
    assert controller.value("expertmesh_controller_bias_delta_max") > 0
    assert controller.value("expertmesh_controller_balancing_alive") == 1
    assert controller.value("expertmesh_controller_balancing_age_seconds") < 5
    assert controller.value("expertmesh_controller_balance_mode", mode="adaptive") == 1
    assert controller.value("expertmesh_controller_balance_mode", mode="frozen") == 0
    assert controller.value("expertmesh_controller_routers") == 1
    assert controller.value("expertmesh_controller_servers", state="ready") == 2
    assert controller.value("expertmesh_controller_rebalancing") == 1
    for outcome in ("done", "failed"):
        assert controller.value("expertmesh_controller_rebalances_total", outcome=outcome) == 0
    for name in ("servers_wanted", "servers_starting", "supervised"):
        assert controller.value(f"expertmesh_controller_{name}") == 0
    assert controller.value("expertmesh_controller_pushes_total") > 0
    assert controller.value("expertmesh_controller_reports_total", kind="router") > 0
    versions = ("bias_version", "epoch")
    assert [controller.value(f"expertmesh_controller_{name}") for name in versions] == [
        router.value(f"expertmesh_router_{name}") for name in versions
    ]


def test_every_request_is_counted_once_however_it_ends(checkpoint: Path) -> None:
    with local_mesh(checkpoint, metrics=True) as running:
        router = admission(running.routers[0])
        hidden = torch.randn(4, 64)
        with (
            channel_to(running.address) as channel,
            RawStream(router_pb2_grpc.RouterServiceStub(channel).ForwardStream) as stream,
        ):
            unary = router_pb2_grpc.RouterServiceStub(channel).Forward
            with devices_held(running):
                stream.send(
                    forward(1, hidden, 1),
                    forward(1, hidden, 2),
                    forward(1, hidden, 3, length=8),  # its chunks never come
                    forward(99, hidden, 4),
                )
                call = unary.future(router_pb2.ForwardRequest(layer=1, hidden_states=proto(hidden)))
                wait_until(lambda: router.frames == 4, 5.0, "in flight, one refused")
                stream.send(router_pb2.ForwardStreamRequest(frame_id=2, cancel={}))
                call.cancel()
                wait_until(lambda: router.frames == 2, 5.0, "cancelled")
            answers = stream.finish()
            with pytest.raises(grpc.RpcError):
                unary(router_pb2.ForwardRequest(layer=98, hidden_states=proto(hidden)))
            unary(router_pb2.ForwardRequest(layer=1, hidden_states=proto(hidden)))
        wait_until_idle(running)
        seen = scrape(running.routers[0].metrics_address)

    assert {answer.frame_id for answer in answers} == {1, 3, 4}
    requests = seen.families["expertmesh_router_requests_total"].samples
    assert {dict(labels)["outcome"]: n for (_, labels), n in requests.items() if n} == {
        "OK": 2,
        "CANCELLED": 2,
        "INVALID_REQUEST": 1,
        "UNKNOWN_LAYER": 2,
    }


def test_a_full_queue_shows_as_the_outcome_of_requests(checkpoint: Path) -> None:
    rpc = RpcConfig(host="127.0.0.1", max_inflight_frames=0)
    with local_mesh(checkpoint, shards=1, metrics=True, rpc=rpc) as running:
        with expertmesh.connect(running.address) as client:
            hidden = torch.randn(4, client.describe().hidden_size)
            with pytest.raises(expertmesh.MeshError):
                client.forward(hidden, 1, timeout=0.5)
        seen = scrape(running.servers[0].metrics_address)

    assert seen.value("expertmesh_expert_requests_total", outcome="QUEUE_FULL") > 1
    assert seen.value("expertmesh_expert_requests_total", outcome="OK") == 0


def test_a_repeated_report_is_counted_as_dropped(mesh: LocalMesh) -> None:
    name, labels = "expertmesh_controller_reports_dropped_total", {"kind": "router"}
    before = scrape(mesh.controller.metrics_address).value(name, **labels)
    link = mesh.routers[0]._link

    async def repeat() -> None:
        link._sequence -= 1
        link._reported = (-1, -1, -1)  # as if the answer to the last report had been lost
        await link.flush(Deadline.after(10.0))

    loop.run(repeat())

    assert scrape(mesh.controller.metrics_address).value(name, **labels) == before + 1


def test_the_alive_gauge_goes_dead_with_the_balancing_loop(tmp_path: Path) -> None:
    async def start() -> ControllerServer:
        server = ControllerServer(
            tmp_path / "s.sqlite", host="127.0.0.1", rpc=RpcConfig(host="127.0.0.1"), metrics_port=0
        )
        await server.start()
        return server

    def alive() -> float:
        return scrape(server.metrics_address).value("expertmesh_controller_balancing_alive")

    server = loop.run(start())
    server._ticked_at -= 2 * ALIVE_WITHIN_S  # as if the loop had hung, and goes on
    wait_until(lambda: alive() == 1, 5.0, "alive again")
    loop.run(server._tasks.close())  # its loops have ended
    server._ticked_at -= 2 * ALIVE_WITHIN_S
    dead = alive()
    loop.run(server.stop())

    assert dead == 0


def test_the_page_lists_every_metric_as_it_is_served(
    router: Scrape, experts: list[Scrape], controller: Scrape
) -> None:
    page = (ROOT / "docs/operations.md").read_text()
    rows = re.findall(r"^\| `(expertmesh_\w+)` \| (\w+) \| ([^|]*) \| (.*) \|$", page, re.M)
    written = {name: (kind, labels.strip(), text) for name, kind, labels, text in rows}

    served = {}
    for seen in (router, *experts, controller):
        for name, family in seen.ours.items():
            labels = ", ".join(f"`{label}`" for label in sorted(family.labels - {"le"}))
            served[name] = (family.kind, labels, family.help)
    assert written == served


def test_no_metrics_are_served_unless_asked_for(checkpoint: Path) -> None:
    with local_mesh(checkpoint, shards=1) as quiet:
        assert quiet.controller.metrics_address == ""
        assert quiet.routers[0].metrics_address == ""
        assert quiet.servers[0].metrics_address == ""


def test_a_stopped_service_serves_metrics_no_more(checkpoint: Path) -> None:
    with local_mesh(checkpoint, shards=1, metrics=True) as running:
        addresses = [
            running.controller.metrics_address,
            running.routers[0].metrics_address,
            running.servers[0].metrics_address,
        ]
        assert all(scrape(address).series for address in addresses)

    for address in addresses:
        with pytest.raises(urllib.error.URLError):
            scrape(address)


def test_a_metrics_port_that_is_taken_is_an_error_that_says_so(
    mesh: LocalMesh, tmp_path: Path
) -> None:
    taken = int(mesh.controller.metrics_address.rpartition(":")[2])

    async def start() -> None:
        server = ControllerServer(
            tmp_path / "s.sqlite",
            host="127.0.0.1",
            rpc=RpcConfig(host="127.0.0.1"),
            metrics_port=taken,
        )
        try:
            await server.start()
        finally:
            server._store.close()

    with pytest.raises(expertmesh.ConfigError, match="another --metrics-port"):
        loop.run(start())


def test_a_service_by_hand_prints_where_its_metrics_are(tmp_path: Path) -> None:
    with Service(
        "load_controller", "--state", str(tmp_path / "s.sqlite"), "--metrics-port", "0"
    ) as service:
        said = service.line.split()
        assert said[0::2] == ["LISTENING", "metrics"]
        assert said[1] == service.address

        assert scrape(said[3]).value("expertmesh_controller_balancing_alive") == 1
