"""Online balancing as operators see it: pushes, the kill switch, and signs that it has stopped."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import expertmesh
from expertmesh import BalanceConfig
from expertmesh.config import RouterConfig
from expertmesh.model import GateSpec, GateWeights, LayerSpec, ModelSpec
from expertmesh.rpc import loop
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2
from fleet.cli import main
from load_controller.server import ControllerServer
from router_service.controller_link import ControllerLink
from router_service.pool import ExpertPool
from router_service.router import Router
from router_service.snapshot import Model
from tests.checkpoints import make_checkpoint
from tests.mesh import LOCAL, LocalMesh, local_mesh, wait_until

HIDDEN, MOE_LAYER = 64, 1
LAYERS, EXPERTS = 58, 256  # DeepSeek-V3's
ROUTERS, PUSHES, PUSH_S = 5, 300, 0.2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    return path


def _large_model() -> Model:
    """DeepSeek-V3's layers and experts; the gates are only as wide as biases need."""
    gate = GateSpec(score="sigmoid", top_k=8, n_group=8, topk_group=4, group_score="top2_sum")
    layers = tuple(
        LayerSpec(
            index=index,
            num_experts=EXPERTS,
            intermediate_size=2,
            shared_intermediate_size=0,
            gate=gate,
        )
        for index in range(LAYERS)
    )
    spec = ModelSpec(model_type="t", hidden_size=1, dtype=torch.float32, layers=layers)
    weights = GateWeights(torch.zeros(EXPERTS, 1), torch.zeros(EXPERTS), None)
    return Model(spec, dict.fromkeys(range(LAYERS), weights), "digest", torch.float32)


class _Watched(Router):
    """Says when it has another snapshot."""

    def __init__(self, model: Model, config: RouterConfig, heard: Callable[[Router], None]) -> None:
        self._heard = heard
        super().__init__(model, ExpertPool(model.digest, config), config)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "snapshot":
            self._heard(self)


@asynccontextmanager
async def _routers(
    controller: ControllerServer, heard: Callable[[Router], None]
) -> AsyncIterator[list[Router]]:
    """Routers that follow the controller by real links, and serve nobody."""
    model, config = _large_model(), RouterConfig()
    routers = [_Watched(model, config, heard) for _ in range(ROUTERS)]
    links = [
        ControllerLink(router, f"router-{index}", controller.address, config.report_every_s)
        for index, router in enumerate(routers)
    ]
    watches = [asyncio.ensure_future(link.watch()) for link in links]
    try:
        yield routers
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.wait(watches)
        for link, router in zip(links, routers, strict=True):
            await link.close()
            await router.close()


def _report(sequence: int) -> pb.ReportAssignmentsRequest:
    """Totals that close a window of every layer."""
    shape = (LAYERS, EXPERTS)
    steps = np.random.default_rng(0).integers(1, 9, shape) * sequence
    layers = [
        router_pb2.LayerLoad(layer=index, counts=counts.tolist(), top_k=8)
        for index, counts in enumerate(steps)
    ]
    return pb.ReportAssignmentsRequest(
        source="reporter", incarnation="i", sequence=sequence, layers=layers
    )


async def _push_times(state: Path) -> list[float]:
    """Seconds from the end of the turn that published a bias until each router uses it."""
    balance = BalanceConfig(mode="adaptive", window_tokens=64, window_s=1000.0)
    server = ControllerServer(state, host="127.0.0.1", balance=balance, rpc=LOCAL)
    await server.start()
    times: list[float] = []
    waiting: set[int] = set()
    arrived = asyncio.Event()
    target, pushed_at = 1, 0.0

    def heard(router: Router) -> None:
        if id(router) in waiting and router.snapshot.bias_version >= target:
            waiting.discard(id(router))
            times.append(time.monotonic() - pushed_at)
            if not waiting:
                arrived.set()

    async with _routers(server, heard) as routers:
        for push in range(PUSHES + 1):
            waiting |= {id(router) for router in routers}
            arrived.clear()
            if push:  # the first waits until all have connected
                server.controller.take_assignments(_report(push), time.monotonic())
                while server.controller.close_windows(time.monotonic()):
                    pass  # a turn closes some of the layers
                assert server.controller.bias_version > target
                target = server.controller.bias_version
            pushed_at = time.monotonic()
            async with asyncio.timeout(10.0):
                await arrived.wait()
        assert {router.snapshot.bias_version for router in routers} == {target}
        assert all(len(router.snapshot.biases) == LAYERS for router in routers)
    await server.stop()
    return times[ROUTERS:]


def test_a_push_reaches_every_router_within_a_fifth_of_a_second(tmp_path: Path) -> None:
    times = loop.run(_push_times(tmp_path / "state.sqlite"))

    assert len(times) == ROUTERS * PUSHES
    assert float(np.percentile(times, 99)) <= PUSH_S


def _adapt(cluster: LocalMesh, mesh: expertmesh.Mesh, windows: int = 3) -> torch.Tensor:
    """Serves until the bias has moved that many times. The rows that were served."""
    hidden = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0))
    router = cluster.routers[0].router
    for _ in range(windows):
        before = router.snapshot.bias_version
        mesh.forward(hidden, MOE_LAYER)
        mesh.load()  # reports, which closes the window
        wait_until(lambda v=before: router.snapshot.bias_version > v, 5.0, "a new bias")
    return hidden


def _adaptive(**settings: Any) -> BalanceConfig:
    return BalanceConfig(
        **{"mode": "adaptive", "update_rate": 0.05, "window_tokens": 64} | settings
    )


def _cli(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capfd.readouterr()
    code = main(arguments)
    return code, capfd.readouterr().out


def test_freezing_restores_the_checkpoints_routing_within_one_push(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        local_mesh(checkpoint, routers=2) as frozen,
        expertmesh.connect(frozen.address) as mesh,
    ):
        hidden = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0))
        own = mesh.forward(hidden, MOE_LAYER)
    with (
        local_mesh(checkpoint, routers=2, balance=_adaptive()) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        _adapt(cluster, mesh, windows=6)
        adapted = mesh.forward(hidden, MOE_LAYER)
        code, out = _cli(capfd, "balance", "freeze", "--router", cluster.address, "--json")
        answer = json.loads(out)
        again = [mesh.forward(hidden, MOE_LAYER) for _ in range(4)]

        assert code == 0
        assert answer["balance_mode"] == "frozen"
        version = cluster.controller.controller.bias_version
        assert answer["bias_version"] == version, "one push, and none after it"
        assert answer["in_use"]
        assert [r["bias_version"] for r in answer["routers"]] == [version] * 2
        assert not torch.allclose(adapted, own)
        for output in again:
            torch.testing.assert_close(output, own)


def test_adapt_and_reset_are_each_one_push(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        local_mesh(checkpoint, balance=_adaptive(mode="frozen")) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        adapt_code, adapt = _cli(capfd, "balance", "adapt", "--router", cluster.address)
        _adapt(cluster, mesh)
        moved = mesh.load().max_abs_delta[MOE_LAYER]
        reset_code, reset = _cli(capfd, "balance", "reset", "--router", cluster.address)

        assert (adapt_code, reset_code) == (0, 0)
        assert "balance adaptive, bias version 2, in use by 1 of 1 routers" in adapt
        assert "balance adaptive" in reset
        assert moved == pytest.approx(0.15, abs=1e-6)
        assert mesh.load().max_abs_delta[MOE_LAYER] == 0.0


def test_freezing_says_when_a_router_has_not_heard_of_it(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = RouterConfig(report_every_s=1000.0)  # it applies the push, but does not say so
    with local_mesh(checkpoint, balance=_adaptive(), router_config=config) as cluster:
        code, out = _cli(capfd, "balance", "freeze", "--router", cluster.address, "--wait-s", "0.2")

    assert code == 3
    assert "in use by 0 of 1 routers" in out
    assert "router-0 at 127.0.0.1:" in out


def test_freezing_names_a_router_that_is_cut_off_and_forgets_one_that_was_stopped(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with local_mesh(checkpoint, routers=3, balance=_adaptive()) as cluster:
        freeze = ("balance", "freeze", "--router", cluster.routers[0].address, "--wait-s", "0.2")
        wait_until(lambda: _cli(capfd, *freeze)[0] == 0, 5.0, "all confirmed")
        stopped, cut_off = cluster.routers.pop(1), cluster.routers[1]
        loop.run(stopped.stop())
        loop.run(cut_off._tasks.close())  # its loops with the controller; it serves on

        code, out = _cli(capfd, *freeze)

        with expertmesh.connect(cut_off.address) as mesh:
            assert mesh.forward(torch.randn(2, HIDDEN), MOE_LAYER).shape == (2, HIDDEN)
    assert code == 3
    assert "in use by 1 of 2 routers" in out
    assert "router-2 at 127.0.0.1:" in out
    assert "cut off or dead for" in out


def test_the_kill_switch_works_by_the_controllers_own_address(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with local_mesh(checkpoint, balance=_adaptive()) as cluster:
        address = cluster.controller.address
        code, _ = _cli(capfd, "balance", "freeze", "--controller", address)

        assert code == 0
        assert cluster.routers[0].router.snapshot.mode == "frozen"


def test_a_router_cut_off_keeps_its_version_and_says_so(checkpoint: Path) -> None:
    with (
        local_mesh(checkpoint, balance=_adaptive()) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        hidden = _adapt(cluster, mesh)
        wait_until(lambda: mesh.status().balance_alive, 5.0, "heard")
        before = mesh.status()
        loop.run(cluster.controller.stop())
        served = mesh.forward(hidden, MOE_LAYER)
        wait_until(lambda: not mesh.status().balance_alive, 10.0, "known to be cut off")
        after = mesh.status()
        cluster.controller = cluster.start_controller(cluster.state)

        assert before.controller_connected
        assert before.controller_age_s <= 3.0
        assert not after.controller_connected
        assert after.controller_age_s > 3.0
        assert after.bias_version == before.bias_version
        torch.testing.assert_close(mesh.forward(hidden, MOE_LAYER), served)
        wait_until(lambda: mesh.status().balance_alive, 10.0, "heard again")


def _end_the_loop(cluster: LocalMesh) -> None:
    loop.run(cluster.controller._tasks.close())


def _break_the_rules(cluster: LocalMesh) -> None:
    def broken(now: float) -> bool:
        raise ValueError("a bug in the rules")

    cluster.controller.controller.balancer.close_due = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("stop", [_end_the_loop, _break_the_rules])
def test_balancing_is_dead_when_its_loop_is_though_the_controller_answers(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], stop: Callable[[LocalMesh], None]
) -> None:
    with (
        local_mesh(checkpoint, balance=_adaptive()) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        wait_until(lambda: mesh.status().balance_alive, 5.0, "alive")
        alive = _cli(capfd, "status", "--router", cluster.address)[1]

        stop(cluster)
        wait_until(lambda: not mesh.status().balance_alive, 10.0, "seen to be dead")
        dead = _cli(capfd, "status", "--router", cluster.address)[1]

        assert mesh.status().controller_connected
        mesh.forward(torch.randn(5, HIDDEN), MOE_LAYER)
        top_k = mesh.describe().layers[MOE_LAYER].top_k
        assert int(mesh.load().counts[MOE_LAYER].sum()) == 5 * top_k, "and counts are still exact"
        assert "balance     adaptive, alive" in alive
        assert "NOT ALIVE: last heard" in dead


def test_the_meter_says_what_share_of_picks_the_trained_bias_would_not_have_made(
    checkpoint: Path,
) -> None:
    with (
        local_mesh(checkpoint, balance=_adaptive(update_rate=0.2)) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        hidden = _adapt(cluster, mesh)
        router = cluster.routers[0].router
        gate, spec = router.model.gates[MOE_LAYER], router.model.spec.layer(MOE_LAYER)
        assert spec is not None
        bias = router.snapshot.biases[MOE_LAYER]
        for _ in range(20):
            mesh.forward(hidden, MOE_LAYER)
        own = expertmesh.gating.route(hidden, gate, spec.gate, gate.bias).expert_ids
        served = expertmesh.gating.route(hidden, gate, spec.gate, bias).expert_ids
        same = (served[:, :, None] == own[:, None, :]).any(2)

        assert float(1 - same.float().mean()) > 0.05
        wait_until(lambda: mesh.status().divergence > 0.05, 5.0, "measured")
        wait_until(lambda: mesh.load().divergence[MOE_LAYER] > 0.05, 5.0, "known to the controller")


def test_top_shows_what_happened_between_two_looks(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        local_mesh(checkpoint, routers=2, balance=_adaptive()) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        _adapt(cluster, mesh)
        interval = ("--interval-s", "0.05")
        code, out = _cli(capfd, "top", "--router", cluster.address, "--json", *interval)
        top = json.loads(out)
        _, text = _cli(capfd, "top", "--router", cluster.address, "--once", *interval)
        refused, _ = _cli(capfd, "top", "--router", cluster.address, "--interval-s", "0")

    assert (code, refused) == (0, 1)
    assert top["balance_mode"] == "adaptive"
    assert top["routers"] == 2
    assert [row["layer"] for row in top["layers"]] == [1, 2]
    assert top["layers"][0]["max_abs_delta"] == pytest.approx(0.15, abs=1e-6)
    assert {row["server_id"]: row["state"] for row in top["servers"]} == {
        "s0r0": "ready",
        "s1r0": "ready",
    }
    assert "MaxVio" in text
    assert "s1r0" in text
