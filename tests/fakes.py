"""Stand-ins for an ExpertPool and its links: servers that fail as a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import torch

from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.config import RouterConfig
from expertmesh.dispatch import Holders, combine
from expertmesh.errors import MeshError
from expertmesh.placement import SlotMap
from expertmesh.rpc.deadline import Deadline
from router_service.fanout import FanOut, FanOutResult
from router_service.routing import RoutedBatch
from router_service.snapshot import Snapshot
from router_service.standing import Standing

#: What a server does at its n-th call: an error to raise, or seconds to be silent first.
Behaviour = Callable[[int], MeshError | float]

LAYER, EXPERTS, EPOCH = 3, 6, 7  # of the batches that the servers are asked for
ALL = set(range(EXPERTS))


def routed_batch(rows: int, seed: int) -> RoutedBatch:
    """Random rows for three random experts each."""
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(EXPERTS)[:3] for _ in range(rows)]).astype(np.int32)
    weights = generator.random((rows, 3), np.float32)
    hidden = torch.from_numpy(generator.random((rows, 4), np.float32))
    return RoutedBatch(hidden, ids, weights, 3)


def right_answer(batch: RoutedBatch) -> torch.Tensor:
    """What fake servers make of a batch together."""
    factor = ((batch.expert_ids + 1).astype(np.float32) * batch.weights).sum(1)
    return batch.hidden * torch.from_numpy(factor)[:, None]


class FakeServer:
    """Answers hidden * (id + 1) * weight summed over the pairs, or as `behave` says.

    `behave(call)` gives an error to raise, or seconds to be silent before the answer.
    """

    def __init__(
        self,
        held: set[int],
        behave: Behaviour,
        patience_s: float = 0.02,
        row_patience_s: float = 0.0,
    ) -> None:
        self.held = held
        self.patience, self.row_patience = patience_s, row_patience_s
        self.behave = behave
        self.calls = 0
        self.asked: list[tuple[ExecuteRequest, Deadline]] = []
        self.lost = False
        self.connected = True
        self.in_flight = 0
        self.standing = Standing(patience_s, hedge_factor=4.0)

    def left_out(self, rows: int) -> bool:
        return self.lost or self.standing.is_suspect(rows)

    def patience_s(self, request: ExecuteRequest, tried: int = 0) -> float:
        """What the test says, whatever it has learnt."""
        rows = request.hidden_states.shape[0]
        return self.patience / (1 << tried) + rows * self.row_patience

    def suspect(self, rows: int, patience_s: float) -> None:
        self.standing.suspect(time.monotonic(), rows, patience_s)

    def answered(self, asked_at: float, rows: int, patience_s: float) -> None:
        self.standing.answered(time.monotonic(), asked_at, rows, patience_s)

    def ask(self, request: ExecuteRequest, deadline: Deadline) -> asyncio.Future[ExecuteResponse]:
        self.in_flight += 1
        self.asked.append((request, deadline))
        future = asyncio.ensure_future(self.execute(request, deadline))
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: asyncio.Future[ExecuteResponse]) -> None:
        self.in_flight -= 1

    async def execute(self, request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
        self.calls += 1
        outcome = self.behave(self.calls)
        if isinstance(outcome, MeshError):
            await asyncio.sleep(0)
            raise outcome
        await asyncio.sleep(outcome)
        ids = request.expert_ids
        assert set(ids[ids >= 0].tolist()) <= self.held
        weights = request.expert_weights
        factor = np.where(ids >= 0, (ids + 1).astype(np.float32) * weights, np.float32(0)).sum(1)
        return ExecuteResponse(
            hidden_states=request.hidden_states * torch.from_numpy(factor)[:, None]
        )


class FakePool:
    """The servers by name, as `FanOut` uses an ExpertPool."""

    def __init__(self, servers: dict[str, FakeServer], layer: int, experts: int) -> None:
        self.servers = servers
        self.on_left_out: Callable[[], None] = lambda: None
        self.looks = 0  # for who holds what
        self.slots = SlotMap(
            EPOCH,
            tuple(servers),
            {layer: np.array([[e in s.held for e in range(experts)] for s in servers.values()])},
        )

    def link(self, server_id: str) -> FakeServer | None:
        return self.servers.get(server_id)

    def links(self) -> list[tuple[str, FakeServer]]:
        return sorted(self.servers.items())

    def lose(self, name: str) -> None:
        """The controller has not heard the server for a while."""
        self.servers[name].lost = True
        self.on_left_out()

    def left_out(self, rows: int) -> frozenset[str]:
        return frozenset(name for name, server in self.servers.items() if server.left_out(rows))

    def holders(
        self, slots: SlotMap, layer: int, avoid: frozenset[str] = frozenset(), rows: int = 1
    ) -> Holders:
        self.looks += 1
        left_out = self.left_out(rows)
        holds = (
            slots.holds[layer] & np.array([name not in avoid for name in slots.servers])[:, None]
        )
        trusted = holds & np.array([name not in left_out for name in slots.servers])[:, None]
        return Holders(np.where(trusted.any(0), trusted, holds), np.ones(len(slots.servers)))

    async def wait_change(self, timeout_s: float) -> None:
        """Nothing ever changes."""
        await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        """Nothing to close."""


class Bench:
    """A fan out over fake servers."""

    def __init__(self, config: RouterConfig, **servers: FakeServer) -> None:
        self.pool = FakePool(servers, LAYER, EXPERTS)
        self.fanout = FanOut(self.pool, lambda: self.pool.slots, config)  # type: ignore[arg-type]

    async def run(self, rows: int = 12, seed: int = 2, timeout_s: float = 5.0) -> FanOutResult:
        """What becomes of one batch, whose answer is right."""
        batch, snapshot = routed_batch(rows, seed), Snapshot(self.pool.slots)
        result = await self.fanout.run(batch, LAYER, snapshot, Deadline.after(timeout_s))
        torch.testing.assert_close(combine(batch.hidden, result.contributions), right_answer(batch))
        return result
