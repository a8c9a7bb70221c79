"""What online balancing promises of a running cluster: balance, prompt pushes, a ceiling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import expertmesh
from expertmesh import BalanceConfig, gating
from expertmesh.codec.messages import ForwardRequest
from expertmesh.rpc import loop
from expertmesh.rpc.deadline import Deadline
from load_controller.balancer import max_violation
from router_service.router import Router
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh

HIDDEN, LAYER = 64, 1
ROWS = 2048  # of a request
WINDOW_TOKENS = 4096
WARM_UP, MEASURED = 70, 100  # windows
TOKENS_PER_S = 20_000

WINDOW_S, PUSH_S, CEILING = 0.5, 0.2, 0.1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    return path


class _Skewed:
    """Hidden states that all lean one way, never the same twice: a stationary skewed gate."""

    def __init__(self) -> None:
        self._chance = torch.Generator().manual_seed(0)
        self._mean = torch.randn(HIDDEN, generator=self._chance)

    def __call__(self) -> torch.Tensor:
        return self._mean + torch.randn(ROWS, HIDDEN, generator=self._chance)


def _counts(cluster: LocalMesh) -> np.ndarray:
    """Assignments so far, as the controller counts them."""
    loads = {entry.layer: entry for entry in cluster.controller.controller.load(now=0.0).layers}
    return np.array(loads[LAYER].counts) if LAYER in loads else np.zeros(16, np.int64)


async def _serve(cluster: LocalMesh, windows: int) -> tuple[np.ndarray, float]:
    """Serves until that many windows have closed. Counts and tokens a second meanwhile."""
    skewed, balancer = _Skewed(), cluster.controller.controller.balancer
    before, started = _counts(cluster), time.monotonic()
    last = balancer.closed_windows + windows
    async with expertmesh.connect_async(cluster.address) as mesh:

        async def ask() -> None:
            while balancer.closed_windows < last:
                await mesh.forward(skewed(), LAYER)

        async with asyncio.TaskGroup() as group:
            for _ in range(2):  # one request computes while the next one travels
                group.create_task(ask())
        await mesh.load()
    counts = _counts(cluster) - before
    return counts, counts.sum() / 4 / (time.monotonic() - started)


def _watch_lag(cluster: LocalMesh) -> list[int]:
    """At each close of a window: how many versions the router's is behind the one before."""
    controller, router = cluster.controller.controller, cluster.routers[0].router
    close, lags = controller.balancer.close_due, []

    def closing(now: float) -> bool:
        closed, version = controller.balancer.closed_windows, controller.bias_version
        moved = close(now)
        if controller.balancer.closed_windows > closed:
            lags.append(version - router.snapshot.bias_version)
        return moved

    controller.balancer.close_due = closing  # type: ignore[method-assign]
    return lags


def test_a_stationary_skewed_gate_is_balanced_and_its_pushes_keep_up(checkpoint: Path) -> None:
    adaptive = BalanceConfig(
        mode="adaptive",
        update_rate=0.02,
        schedule="cosine",
        schedule_windows=WARM_UP,
        update_rate_floor=5e-4,
        window_tokens=WINDOW_TOKENS,
    )
    with local_mesh(checkpoint, balance=replace(adaptive, mode="frozen")) as cluster:
        frozen, _ = loop.run(_serve(cluster, windows=5))
    with local_mesh(checkpoint, balance=adaptive) as cluster:
        loop.run(_serve(cluster, windows=WARM_UP))
        lags = _watch_lag(cluster)
        balanced, tokens_per_s = loop.run(_serve(cluster, windows=MEASURED))

    assert max_violation(frozen) >= 1.0
    assert max_violation(balanced) <= 0.02
    assert len(lags) >= MEASURED
    assert max(lags) <= 1
    assert tokens_per_s >= TOKENS_PER_S


def _populations() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that all choose alike by a wide margin, and rows of every kind, near ties among them.

    The first let a delta grow without changing a pick; the same delta changes many of the second.
    """
    chance = torch.Generator().manual_seed(4)
    calm = 2.0 * torch.randn(HIDDEN, generator=chance) + 0.05 * torch.randn(
        1024, HIDDEN, generator=chance
    )
    return calm, torch.randn(1024, HIDDEN, generator=chance)


async def _divergences(router: Router, seconds: float) -> list[tuple[float, float]]:
    """(when, divergence) of each answer, as the adversary swaps one population for the other."""
    gate, spec = router.model.gates[LAYER], router.model.spec.layer(LAYER)
    assert spec is not None
    assert spec.gate is not None
    calm, mixed = _populations()
    own = {}
    for rows in (calm, mixed):
        scores = gating.scores(gating.logits(rows, gate, spec.gate), spec.gate)
        own[id(rows)] = gating.choice_mask(scores, spec.gate, gate.bias)
    measured, started = [], time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        rows = calm if passed % 3.0 < 2.0 else mixed
        request = ForwardRequest(layer=LAYER, hidden_states=rows, want_detail=True)
        answer = await router.forward(request, Deadline.after(10.0))
        assert answer.expert_ids is not None
        changed = gating.changed_picks(answer.expert_ids, own[id(rows)])
        measured.append((time.monotonic(), changed / answer.expert_ids.numel()))
    return measured


def _longest(measured: list[tuple[float, float]], above: Callable[[float], bool]) -> float:
    """Seconds from the first to the last answer of the longest run."""
    longest, first = 0.0, None
    for at, share in measured:
        if not above(share):
            first = None
            continue
        first = at if first is None else first
        longest = max(longest, at - first)
    return longest


@pytest.mark.parametrize("ceiling", [CEILING, None], ids=["with a ceiling", "without"])
def test_divergence_stays_above_its_ceiling_no_longer_than_a_window_and_a_push(
    checkpoint: Path, ceiling: float | None
) -> None:
    balance = BalanceConfig(
        mode="adaptive",
        update_rate=0.05,
        window_tokens=10**9,
        window_s=WINDOW_S,
        max_delta=0.1,
        divergence_ceiling=ceiling,
    )
    with local_mesh(checkpoint, balance=balance) as cluster:
        router = cluster.routers[0].router
        measured = loop.run(_divergences(router, seconds=9.0 if ceiling else 3.0))

    overshoot = _longest(measured, lambda share: share > CEILING)
    assert max(share for _, share in measured) >= 2 * CEILING, "the adversary has overshot"
    if ceiling:
        assert overshoot <= WINDOW_S + PUSH_S
    else:
        assert overshoot > WINDOW_S + PUSH_S, "which would have lasted"
