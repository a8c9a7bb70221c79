"""Servers of unequal speed: what they measure, and what the fast and the slow one get to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import expertmesh
from expert_service.server import ExpertServer
from expertmesh.rpc import loop
from fleet import control
from fleet.survey import survey
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, start_server_holding, wait_until

LAYER, EXPERTS = 1, 16
FAST, SLOW = "s0r0", "slow"
ROWS = 512


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """Two servers hold every expert: one computes them with oneDNN, one pair by pair."""
    path: Path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(
        "deepseek_v3", path, n_routed_experts=EXPERTS, num_experts_per_tok=4, n_group=1,
        topk_group=1, n_shared_experts=1, num_hidden_layers=2, hidden_size=256,
        moe_intermediate_size=1024,
    )  # fmt: skip
    with local_mesh(path, shards=1, server_rates="measured", backend="onednn") as mesh:
        slots = mesh.servers[0].shard.slots
        slow: ExpertServer = loop.run(
            start_server_holding(path, mesh.controller.address, SLOW, slots, backend="reference")
        )
        mesh.extra.append(slow)
        with expertmesh.connect(mesh.address) as client:
            wait_until(
                lambda: (
                    all(s.state == "ready" and s.connected for s in client.status().servers)
                    and len(client.status().servers) == 2
                ),
                30.0,
                "two servers ready",
            )
            wait_until(
                lambda: {s.server_id: s.rate for s in client.status().servers}[SLOW] < 1.0,
                30.0,
                "told of their speeds",
            )
        yield mesh


def _executed(server: ExpertServer) -> int:
    return int(server.shard._layers[LAYER].counts_E[:EXPERTS].sum())


def test_servers_say_how_fast_they_are_and_count_accordingly(cluster: LocalMesh) -> None:
    with expertmesh.connect(cluster.address) as client:
        seen = {server.server_id: server for server in client.status().servers}
    fleet = control.get_fleet(cluster.controller.address).servers
    surveyed = survey(cluster.address).servers

    ratio = seen[SLOW].pairs_per_s / seen[FAST].pairs_per_s
    assert 0 < ratio < 1 / 1.5
    assert seen[FAST].rate == 1.0
    assert seen[SLOW].rate == pytest.approx(ratio, rel=0.06)  # two digits
    assert {each.server.server_id: each.server.rate for each in fleet} == {
        name: server.rate for name, server in seen.items()
    }
    assert {each.name: each.rate for each in surveyed} == {
        name: server.rate for name, server in seen.items()
    }


@pytest.mark.parametrize(("rows", "requests"), [(16, 64), (ROWS, 1)], ids=["small", "large"])
def test_rows_that_both_could_compute_are_divided_by_their_speeds(
    cluster: LocalMesh, rows: int, requests: int
) -> None:
    fast, slow = cluster.servers[0], cluster.extra[0]
    before = _executed(fast), _executed(slow)
    with expertmesh.connect(cluster.address) as client:
        rate = {s.server_id: s.rate for s in client.status().servers}[SLOW]
        for _ in range(requests):
            hidden = torch.randn(rows, client.describe().hidden_size)
            client.forward(hidden, LAYER, timeout=60.0)
    done = _executed(fast) - before[0], _executed(slow) - before[1]

    assert sum(done) == rows * requests * 4
    assert done[1] / sum(done) == pytest.approx(rate / (1 + rate), abs=0.1)
