"""How the services behave together: counts, biases, restarts, mixed fleets, several routers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

import expertmesh
from expertmesh import BalanceConfig
from expertmesh.config import RouterConfig
from expertmesh.rpc import loop
from tests.checkpoints import make_checkpoint
from tests.mesh import local_mesh, wait_until

HIDDEN = 64
MOE_LAYER = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


def _expected(model: torch.nn.Module, hidden: torch.Tensor, layer: int) -> torch.Tensor:
    with torch.no_grad():
        return model.model.layers[layer].mlp(hidden[None])[0]  # type: ignore[union-attr,index]


def test_counts_are_exact_over_two_routers_and_both_kinds_of_gate(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, _ = checkpoint
    with local_mesh(path, routers=2) as cluster, expertmesh.connect(cluster.address) as mesh:
        top_k = mesh.describe().layers[MOE_LAYER].top_k
        for rows in (1, 7, 0, 30):
            mesh.forward(torch.randn(rows, HIDDEN), MOE_LAYER)
        ids = torch.tensor([[3, 5], [3, -1]])
        mesh.forward(torch.randn(2, HIDDEN), MOE_LAYER, expert_ids=ids, expert_weights=ids * 0.1)
        load = mesh.load()
        answered = [router.router.counts.answered_requests for router in cluster.routers]

    assert all(answered), "the client spreads requests over both routers"
    assert int(load.router_gated[MOE_LAYER].sum()) == 38 * top_k
    by_caller = load.counts[MOE_LAYER] - load.router_gated[MOE_LAYER]
    assert by_caller.nonzero().flatten().tolist() == [3, 5]
    assert by_caller.sum() == 3


def test_what_servers_executed_is_what_was_assigned_where_nothing_was_repeated(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, _ = checkpoint
    patient = RouterConfig(hedge_after_s=60.0)  # on a busy machine too, nothing is asked twice
    with (
        local_mesh(path, replicas=2, routers=2, router_config=patient) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        for _ in range(6):
            mesh.forward(torch.randn(40, HIDDEN), MOE_LAYER)
        ids = torch.tensor([[3, 5], [3, -1]])
        mesh.forward(torch.randn(2, HIDDEN), MOE_LAYER, expert_ids=ids, expert_weights=ids * 0.1)
        assigned = mesh.load().counts[MOE_LAYER]

        def executed() -> torch.Tensor:
            load = cluster.controller.controller.load(now=0.0)
            counts = {entry.layer: list(entry.counts) for entry in load.executions}
            return torch.tensor(counts.get(MOE_LAYER, [0] * 17))

        wait_until(lambda: int(executed()[:-1].sum()) >= int(assigned.sum()), 5.0, "reported")
        (layer,) = cluster.controller.controller.load(now=0.0).layers

        assert layer.repeated_pairs == 0
        assert executed()[:-1].tolist() == assigned.tolist()
        assert int(executed()[-1]) == 240, "rows whose shared expert was computed"


def test_a_client_given_one_router_finds_the_others(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    with local_mesh(checkpoint[0], routers=2) as cluster:
        with expertmesh.connect(cluster.routers[0].address) as mesh:
            found = mesh.describe().routers

        assert sorted(found) == sorted(router.address for router in cluster.routers)


def test_concurrent_requests_for_a_layer_are_merged_and_answered_apart(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, model = checkpoint
    hidden = [torch.randn(rows, HIDDEN) for rows in (1, 5, 2, 9) for _ in range(10)]

    async def ask(address: str) -> list[torch.Tensor]:
        async with expertmesh.connect_async(address) as mesh:
            return list(await asyncio.gather(*(mesh.forward(h, MOE_LAYER) for h in hidden)))

    with local_mesh(path) as cluster:
        outputs = loop.run(ask(cluster.address))
        executed = sum(len(s.shard.execution_counts()) for s in cluster.servers)

    assert executed
    for h, output in zip(hidden, outputs, strict=True):
        torch.testing.assert_close(output, _expected(model, h, MOE_LAYER), rtol=1e-4, atol=1e-5)


def test_adaptive_bias_balances_a_skewed_gate_and_frozen_does_not(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, _ = checkpoint
    balance = BalanceConfig(mode="adaptive", update_rate=0.02, window_tokens=256)
    hidden = torch.randn(256, HIDDEN, generator=torch.Generator().manual_seed(0))

    def violation(mesh: expertmesh.Mesh) -> float:
        before = mesh.load().counts.get(MOE_LAYER, torch.zeros(16, dtype=torch.int64))
        mesh.forward(hidden, MOE_LAYER)
        counts = (mesh.load().counts[MOE_LAYER] - before).double()
        return float(counts.max() / counts.mean() - 1)

    with (
        local_mesh(path, balance=balance) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        first = violation(mesh)
        for _ in range(60):
            version = cluster.controller.controller.bias_version
            mesh.forward(hidden, MOE_LAYER)
            mesh.load()  # flushes the counts: the window closes
            wait_until(
                lambda v=version: cluster.routers[0].router.snapshot.bias_version > v,
                5.0,
                "a new bias version",
            )
        last = violation(mesh)
    with local_mesh(path) as cluster, expertmesh.connect(cluster.address) as mesh:
        violation(mesh)
        frozen = violation(mesh)

    assert first >= 0.5
    assert last <= 0.5 * first
    assert frozen == first


def test_serving_goes_on_without_the_controller_and_no_count_is_lost(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, model = checkpoint
    balance = BalanceConfig(mode="adaptive", update_rate=0.01, window_tokens=8)
    hidden = torch.randn(8, HIDDEN)
    with (
        local_mesh(path, balance=balance) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        top_k = mesh.describe().layers[MOE_LAYER].top_k
        mesh.forward(hidden, MOE_LAYER)
        before = mesh.load()
        wait_until(lambda: mesh.status().bias_version > 1, 5.0, "an adapted bias")
        adapted = mesh.status().bias_version
        address, state = cluster.controller.address, cluster.state

        loop.run(cluster.controller.stop())
        alone = mesh.forward(hidden, 0)
        mesh.forward(hidden, MOE_LAYER)
        with pytest.raises(expertmesh.UnavailableError, match="no count is lost"):
            mesh.load(timeout=2.0)
        cluster.controller = cluster.start_controller(state)

        wait_until(lambda: mesh.status().controller_connected, 10.0, "reconnected")
        after = mesh.load()

        assert cluster.controller.address == address
        assert mesh.status().bias_version >= adapted
        torch.testing.assert_close(alone, _expected(model, hidden, 0), rtol=1e-4, atol=1e-5)
        assert int((after.counts[MOE_LAYER] - before.counts[MOE_LAYER]).sum()) == 8 * top_k


def test_a_server_of_another_checkpoint_is_refused(
    checkpoint: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    make_checkpoint("deepseek_v3", tmp_path, seed=7)
    with local_mesh(checkpoint[0]) as cluster:
        stranger = cluster.start_server("stranger", 0, 2, path=tmp_path)
        wait_until(stranger.failed.done, 10.0, "refused")
        with expertmesh.connect(cluster.address) as mesh:
            names = [server.server_id for server in mesh.status().servers]

        assert isinstance(stranger.failed.result(), expertmesh.MismatchError)
        assert "stranger" not in names


def test_a_second_server_of_the_same_name_takes_over_and_the_first_ends(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, model = checkpoint
    hidden = torch.randn(6, HIDDEN)
    with local_mesh(path) as cluster, expertmesh.connect(cluster.address) as mesh:
        first = cluster.servers[0]
        second = cluster.start_server("s0r0", 0, 2)
        wait_until(first.failed.done, 10.0, "superseded")
        wait_until(
            lambda: any(
                s.incarnation == second.incarnation and s.connected for s in mesh.status().servers
            ),
            10.0,
            "the router has moved",
        )
        output = mesh.forward(hidden, MOE_LAYER)

        assert isinstance(first.failed.result(), expertmesh.SupersededError)
        torch.testing.assert_close(
            output, _expected(model, hidden, MOE_LAYER), rtol=1e-4, atol=1e-5
        )


def test_without_a_server_the_answer_is_an_error_within_the_deadline(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    path, _ = checkpoint
    with local_mesh(path, router_config=RouterConfig()) as cluster:
        with expertmesh.connect(cluster.address) as mesh:
            loop.run(cluster.servers[0].stop())
            with pytest.raises(expertmesh.MeshError):
                mesh.forward(torch.randn(64, HIDDEN), MOE_LAYER, timeout=0.5)
            status = mesh.status()

        assert not status.ready
        assert "no connected server holds" in status.reason
