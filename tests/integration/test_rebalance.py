"""A skew that nobody looks after: experts move by themselves, once, and answers stay the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import expertmesh
from expertmesh.config import RebalanceConfig
from expertmesh.rpc import loop
from fleet import control
from fleet.cli.main import main
from load_controller.server import ControllerServer
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.scrape import scrape

LAYER, EXPERTS, TOP_K, SERVERS = 1, 64, 4, 4
ROWS = 2048
BEFORE, AFTER = 1.0, 0.15  # MaxVio of servers, in served rows
_MOVED_S = 60.0
#: A window is short, so that the test is; one batch is enough to be sure, and no pause hides a
#: second migration that the first should have made needless.
CONFIG = RebalanceConfig(window_s=0.2, least_assignments=ROWS * TOP_K, pause_s=0.0, redundant=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(
        "deepseek_v3", path, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K,
        n_group=1, topk_group=1, moe_intermediate_size=8, n_shared_experts=1, num_hidden_layers=2,
    )  # fmt: skip
    return path


@pytest.fixture
def cluster(checkpoint: Path) -> Iterator[LocalMesh]:
    with local_mesh(checkpoint, shards=SERVERS, rebalance=CONFIG, metrics=True) as mesh:
        yield mesh


@pytest.fixture
def unattended(checkpoint: Path) -> Iterator[LocalMesh]:
    """One that was started without rebalancing."""
    with local_mesh(checkpoint, shards=SERVERS) as mesh:
        yield mesh


class Skewed:
    """Callers' own picks: the first experts by far the most often."""

    def __init__(self, cluster: LocalMesh, client: expertmesh.Mesh) -> None:
        self._cluster, self._client = cluster, client
        self._generator = np.random.default_rng(0)

    def serve(self) -> float:
        """Sends a batch; MaxVio of what the servers computed."""
        before = self._executed()
        weight = np.arange(1, EXPERTS + 1) ** -0.9
        keys = np.log(self._generator.random((ROWS, EXPERTS))) / weight
        ids = torch.from_numpy(np.argsort(-keys, axis=1)[:, :TOP_K].astype(np.int32))
        hidden = torch.randn(ROWS, self._client.describe().hidden_size)
        weights = torch.full(ids.shape, 1.0 / TOP_K)
        self._client.forward(hidden, LAYER, expert_ids=ids, expert_weights=weights, timeout=60.0)
        served = self._executed() - before
        assert served.sum() == ids.numel()
        return float(served.max() / served.mean() - 1)

    def _executed(self) -> np.ndarray:
        return np.array(
            [
                int(server.shard._layers[LAYER].counts_E[:EXPERTS].sum())
                for server in self._cluster.servers
            ]
        )


def turns(controller: ControllerServer, count: int) -> None:
    """Waits until rebalancing has decided so many more times."""
    for _ in range(count):
        last = controller.rebalancing._decided_at
        wait_until(
            lambda last=last: controller.rebalancing._decided_at != last, _MOVED_S, "decided"
        )


def test_a_skew_moves_experts_by_itself_and_then_all_stays(cluster: LocalMesh) -> None:
    controller = cluster.controller
    with expertmesh.connect(cluster.address) as client:
        probe = torch.randn(64, client.describe().hidden_size)
        output = client.forward(probe, LAYER)
        skewed = Skewed(cluster, client)
        before = skewed.serve()
        wait_until(
            lambda: bool(skewed.serve()) and controller.rebalancing.done > 0, _MOVED_S, "moved"
        )
        after = skewed.serve()
        for _ in range(4):  # the same load goes on: it is even now, and nothing moves for it
            skewed.serve()
            turns(controller, 1)
        report = control.get_fleet(controller.address).rebalance
        again = client.forward(probe, LAYER)
        seen = scrape(controller.metrics_address)

    assert before >= BEFORE
    assert after <= AFTER
    assert (report.done, report.failed) == (1, 0)
    assert report.loaded > 0
    assert "nothing moves" in report.reason
    assert [each.layer for each in report.layers] == [LAYER]
    assert report.layers[0].max_violation <= AFTER
    assert (again - output).norm() <= 1e-6 * output.norm()
    assert seen.value("expertmesh_controller_rebalances_total", outcome="done") == 1
    assert seen.value("expertmesh_controller_rebalanced_slots_total") == report.loaded
    assert seen.value("expertmesh_controller_rebalancing") == 1
    assert seen.value("expertmesh_controller_server_maxvio", layer=str(LAYER)) <= AFTER
    assert seen.value("expertmesh_controller_supervised") == 0


def test_switched_off_it_looks_and_leaves_everything_where_it_is(
    cluster: LocalMesh, capfd: pytest.CaptureFixture[str]
) -> None:
    controller = cluster.controller
    command = ["rebalance", "--router", cluster.address, "--json"]
    assert main([*command, "off"]) == 0
    said = json.loads(capfd.readouterr().out)
    epoch = controller.controller.epoch
    with expertmesh.connect(cluster.address) as client:
        skewed = Skewed(cluster, client)
        for _ in range(3):
            skewed.serve()
            turns(controller, 1)
        off = control.get_fleet(controller.address)

        assert main([*command, "on"]) == 0
        wait_until(
            lambda: bool(skewed.serve()) and controller.rebalancing.done > 0, _MOVED_S, "moved"
        )
        capfd.readouterr()
        assert main(["rebalance", "--router", cluster.address]) == 0
        shown = capfd.readouterr().out

    assert not said["enabled"]
    assert "rebalancing  on" in shown
    assert "1 migrations" in shown
    assert not off.rebalance.enabled
    assert off.rebalance.done == 0
    assert off.rebalance.layers[0].planned < off.rebalance.layers[0].max_violation
    assert off.epoch == epoch


def test_what_was_set_by_hand_outlives_the_controller(unattended: LocalMesh) -> None:
    first = unattended.controller
    by_itself = first.rebalancing.enabled
    control.set_rebalancing(first.address, enabled=True)
    loop.run(first.stop())

    second = unattended.start_controller(unattended.state)
    unattended.controller = second

    assert not by_itself
    assert second.rebalancing.enabled


def test_a_migration_that_fails_is_told_and_tried_again(cluster: LocalMesh) -> None:
    controller = cluster.controller
    with expertmesh.connect(cluster.address) as client, controller._mover.alone():
        skewed = Skewed(cluster, client)  # somebody else moves experts meanwhile
        wait_until(
            lambda: bool(skewed.serve()) and controller.rebalancing.failed > 0, _MOVED_S, "refused"
        )
        failed = control.get_fleet(controller.address).rebalance
    with expertmesh.connect(cluster.address) as client:
        skewed = Skewed(cluster, client)
        wait_until(
            lambda: bool(skewed.serve()) and controller.rebalancing.done > 0, _MOVED_S, "moved"
        )

    assert failed.done == 0
    assert "experts are being moved already" in failed.reason
