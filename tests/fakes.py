"""Stand-ins for an ExpertPool and its links: servers that fail as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import torch

from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.dispatch import Holders
from expertmesh.errors import MeshError
from expertmesh.placement import SlotMap
from expertmesh.rpc.deadline import Deadline

#: What a server does at its n-th call: an error to raise, or seconds to be silent first.
Behaviour = Callable[[int], MeshError | float]


class FakeServer:
    """Answers hidden * (id + 1) * weight summed over the pairs, or as `behave` says.

    `behave(call)` gives an error to raise, or seconds to be silent before the answer.
    """

    def __init__(self, held: set[int], behave: Behaviour, patience_s: float = 0.02) -> None:
        self.held = held
        self.patience = patience_s
        self.behave = behave
        self.calls = 0
        self.suspect = False

    def patience_s(self, rows: int) -> float:
        return self.patience

    def suspend(self) -> None:
        self.suspect = True

    def ask(self, request: ExecuteRequest, deadline: Deadline) -> asyncio.Future[ExecuteResponse]:
        return asyncio.ensure_future(self.execute(request, deadline))

    def learn(self, rows: int, took_s: float) -> None:
        """Its patience is what the test says."""

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
        self.slots = SlotMap(
            1,
            tuple(servers),
            {layer: np.array([[e in s.held for e in range(experts)] for s in servers.values()])},
        )

    def link(self, server_id: str) -> FakeServer | None:
        return self.servers.get(server_id)

    def holders(self, slots: SlotMap, layer: int, avoid: frozenset[str] = frozenset()) -> Holders:
        up = np.array([name not in avoid for name in slots.servers])
        return Holders(slots.holds[layer] & up[:, None], np.ones(len(slots.servers)))

    async def wait_change(self, timeout_s: float) -> None:
        await asyncio.sleep(min(timeout_s, 0.001))

    async def close(self) -> None:
        """Nothing to close."""
