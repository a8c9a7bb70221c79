"""Routers, servers and clients that do not fit together, are not ready, or fail."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest
import torch

import expertmesh
import router_service.servicer
from expertmesh.errors import (
    InternalError,
    InvalidRequestError,
    MeshError,
    MismatchError,
    UnavailableError,
)
from expertmesh.rpc import loop
from expertmesh.v1 import control_pb2, router_pb2
from router_service.server import open_model
from tests import mesh as meshes
from tests.bad_input import MOE, E, execute, failure
from tests.bad_input import client as client
from tests.bad_input import control as control
from tests.bad_input import mesh as mesh
from tests.bad_input import sessions as sessions
from tests.bad_input import shard as shard
from tests.bad_input import (
    the_cluster_serves_on_and_nothing_leaks as the_cluster_serves_on_and_nothing_leaks,
)
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, wait_until
from tests.rows import H, rows
from tests.wire import details, proto

# Between router and expert server.


def test_a_stale_epoch_is_refused_by_the_expert_server(mesh, client, shard) -> None:
    client.forward(rows(8), MOE)  # so that the router reports its epoch
    wait_until(lambda: mesh.servers[0].oldest_epoch > 0, 10.0, "told which epochs are in use")

    error = failure(lambda: shard.Execute(execute(mesh, [0], epoch=0), timeout=10.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error) == ("STALE_EPOCH", [], None)
    assert "take the newest placement and plan again" in error.details()
    assert len(shard.Execute(execute(mesh, [0]), timeout=10.0).hidden_states.data) == 4 * H


def test_an_expert_that_is_not_held_is_refused_by_name(mesh, shard) -> None:
    held = mesh.servers[0].shard.held(MOE)
    there = next(expert for expert in range(E) if not held[expert])

    error = failure(lambda: shard.Execute(execute(mesh, [there]), timeout=10.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "SLOT_NOT_HELD"
    assert str(there) in error.details()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_states": proto(torch.zeros(1, 63))},
        {"hidden_states": proto(torch.zeros(1, H, dtype=torch.int32))},
        {"expert_ids": proto(torch.zeros(1, 1, dtype=torch.int64))},
        {"expert_ids": proto(torch.zeros(2, 1, dtype=torch.int32))},
        {"expert_ids": proto(torch.tensor([[-2]], dtype=torch.int32))},
        {"expert_weights": proto(torch.ones(1, 2))},
        {"expert_weights": None},
        {"expert_ids": None},
        {"hidden_states": None},
    ],
    ids=[
        "width",
        "dtype",
        "int64 ids",
        "rows of ids",
        "low id",
        "weights",
        "no weights",
        "no ids",
        "no hidden states",
    ],
)
def test_an_expert_server_checks_what_routers_send(mesh, shard, changes) -> None:
    error = failure(lambda: shard.Execute(execute(mesh, [0], **changes), timeout=10.0))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error)[0] == "INVALID_REQUEST"


def test_a_server_that_is_not_ready_says_so_and_when_to_come_back(mesh, shard, monkeypatch) -> None:
    monkeypatch.setattr(mesh.servers[0], "state", "draining")

    error = failure(lambda: shard.Execute(execute(mesh, [0]), timeout=10.0))

    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details(error) == ("UNAVAILABLE", [], 1.0)
    monkeypatch.undo()
    mesh.wait()


def test_a_cluster_that_cannot_be_reached_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        expertmesh.connect("127.0.0.1:1", timeout=0.2)


@pytest.mark.parametrize("address", ["", "nowhere", "host:port", ":1", "a:1,b"])
def test_an_address_that_is_none_is_refused(address) -> None:
    with pytest.raises(InvalidRequestError, match="expected host:port"):
        expertmesh.connect(address)


def test_a_bug_in_a_server_is_an_internal_error_with_an_incident_id(
    mesh, client, monkeypatch, caplog
) -> None:
    def fail(*_: Any) -> torch.Tensor:
        raise ZeroDivisionError("the secret of /etc/shadow")

    for server in mesh.servers:
        monkeypatch.setattr(server._backend, "compute", fail)
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError) as caught:
        client.forward(rows(2), MOE)

    incident = caught.value.message.split("incident ")[1].split(":")[0]
    assert incident in caplog.text
    assert "secret" in caplog.text
    assert "secret" not in caught.value.message


# Fleets that do not belong together.


def announcement(mesh: LocalMesh, **changes: Any) -> control_pb2.AnnounceServerRequest:
    server = mesh.servers[0]
    return control_pb2.AnnounceServerRequest(
        **{
            "server": server.status(),
            "protocol_version": expertmesh.model.PROTOCOL_VERSION,
            "checkpoint_digest": server._checkpoint.digest,
            "started_at_ns": 1,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint_digest": "f" * 64}, "start every server from the same files"),
        ({"checkpoint_digest": ""}, "names no checkpoint digest"),
        ({"protocol_version": 99}, "run the same release of expertmesh everywhere"),
    ],
    ids=["checkpoint", "no checkpoint", "protocol"],
)
def test_the_controller_refuses_a_server_of_another_fleet(mesh, control, changes, says) -> None:
    error = failure(lambda: control.AnnounceServer(announcement(mesh, **changes), timeout=5.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "FLEET_MISMATCH"
    assert says in error.details()


def test_the_controller_refuses_a_router_of_another_fleet(control) -> None:
    request = control_pb2.WatchClusterRequest(
        router_id="other", incarnation="1", protocol_version=1, checkpoint_digest="f" * 64
    )

    error = failure(lambda: list(control.WatchCluster(request, timeout=5.0)))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "FLEET_MISMATCH"


def test_a_server_of_another_checkpoint_ends_itself_with_the_reason(mesh, tmp_path) -> None:
    make_checkpoint("deepseek_v3", tmp_path, seed=1)
    stranger = loop.run(
        meshes.start_server_at(
            tmp_path, mesh.controller.address, "stranger", 0, 2, backend="reference"
        )
    )

    async def refusal() -> MeshError:
        error: MeshError = await stranger.failed
        await stranger.stop()
        return error

    error = loop.run(refusal())
    assert type(error) is MismatchError
    assert "from the same files" in error.message


def test_the_python_client_refuses_a_router_of_another_protocol(mesh, monkeypatch) -> None:
    monkeypatch.setattr(router_service.servicer, "PROTOCOL_VERSION", 2)

    with pytest.raises(MismatchError, match="install the same release"):
        expertmesh.connect(mesh.address)


def test_an_older_incarnation_of_a_server_is_told_that_it_is_superseded(mesh, control) -> None:
    error = failure(lambda: control.AnnounceServer(announcement(mesh), timeout=5.0))

    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(error)[0] == "SUPERSEDED"
    assert "give each server an id of its own" in error.details()


def test_a_balance_mode_that_is_none_is_refused(control) -> None:
    request = control_pb2.SetBalanceModeRequest(mode="wild")

    error = failure(lambda: control.SetBalanceMode(request, timeout=5.0))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error) == ("INVALID_REQUEST", ["mode"], None)


def test_totals_that_shrink_are_refused_and_taken_back_by_nobody(mesh, control) -> None:
    def report(sequence: int, counts: list[int]) -> control_pb2.ReportAssignmentsRequest:
        return control_pb2.ReportAssignmentsRequest(
            source="shrinking",
            incarnation="1",
            sequence=sequence,
            layers=[router_pb2.LayerLoad(layer=99, counts=counts, top_k=1)],
        )

    control.ReportAssignments(report(1, [2, 5]), timeout=5.0)

    error = failure(lambda: control.ReportAssignments(report(2, [3, 4]), timeout=5.0))
    load = control.GetClusterLoad(control_pb2.GetClusterLoadRequest(), timeout=5.0)

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error) == ("INVALID_REQUEST", ["layers"], None)
    assert [list(entry.counts) for entry in load.layers if entry.layer == 99] == [[2, 5]]


def test_a_router_whose_gate_cannot_choose_is_refused(mesh, control) -> None:
    gate = control_pb2.LayerGate(layer=MOE, score="sigmoid", top_k=5, n_group=1, topk_group=1,
                                 group_score="max", trained_bias=[0.0, 0.0])  # fmt: skip
    request = control_pb2.WatchClusterRequest(
        router_id="odd",
        incarnation="1",
        protocol_version=1,
        checkpoint_digest=open_model(mesh.path).digest,
        gates=[gate],
    )

    error = failure(lambda: list(control.WatchCluster(request, timeout=5.0)))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(error) == ("INVALID_REQUEST", ["gates"], None)
