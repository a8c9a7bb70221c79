"""Moves experts between running servers: calls them, waits for routers, rolls back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from expertmesh.codec.slots import layer_slots, slots_of
from expertmesh.errors import MeshError, MigratingError, UnavailableError
from expertmesh.model import Slot
from expertmesh.rpc import status
from expertmesh.rpc.answering import first_mesh_error
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.v1 import expert_pb2, expert_pb2_grpc
from load_controller.controller import LoadController
from load_controller.migration import Copy, Step, by_server, check_digests, plan_steps

_log = logging.getLogger(__name__)
_LOAD_S = 600.0  # a layer's slots on one server: gigabytes from a slow disk
_CALL_S = 30.0
_SWITCH_S = 10.0  # routers take a placement up in milliseconds, and end batches in flight
_POLL_S = 0.02
_CLEAN_S = 1.0  # between two looks for copies that shall go


@dataclass(frozen=True)
class Migrated:
    """What has moved."""

    epoch: int
    loaded: int
    dropped: int


class Mover:
    """One migration at a time. Used from one event loop."""

    def __init__(self, controller: LoadController) -> None:
        self._controller = controller
        self._busy = False

    async def migrate(self, loads: Iterable[Copy], drops: Iterable[Copy]) -> Migrated:
        """Moves experts, layer by layer.

        Raises MigratingError, what `plan_steps` raises, and what kept a step from being done: that
        step is undone then, and later ones are not begun.
        """
        with self.alone():
            steps = plan_steps(self._controller.shown(), loads, drops)
            return await self.run(steps)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else moves experts meanwhile. Raises MigratingError when somebody does."""
        if self._busy:
            raise MigratingError(
                "experts are being moved already: wait for it to end", retry_after_s=1.0
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    async def run(self, steps: Sequence[Step]) -> Migrated:
        """Carries steps out, one after the other; call it `alone`."""
        for step in steps:
            await self._step(step)
        return Migrated(
            self._controller.epoch,
            sum(len(step.loads) for step in steps),
            sum(len(step.drops) for step in steps),
        )

    async def _step(self, step: Step) -> None:
        controller = self._controller
        controller.expect(step.loads)
        try:
            loaded = await self._load_all(step)
            check_digests(loaded, await self._digests(step))
            epoch = controller.switch(step)
        except BaseException as error:
            controller.give_up(step.loads)
            if isinstance(error, MeshError):
                _log.warning("layer %d stays as it was: %s", step.layer, error.message)
            await asyncio.shield(self._drop_all(step.loads))
            raise
        if await self._is_used(epoch):
            await self._drop_all(step.drops)
        else:  # it may know only the old copies: they stay, and `clean` looks again
            _log.warning("layer %d: some router has not taken up epoch %d for %.0f s: old slots "
                         "stay until it has", step.layer, epoch, _SWITCH_S)  # fmt: skip
        _log.info("layer %d moved: %d slots came, %d went, epoch %d", step.layer,
                  len(step.loads), len(step.drops), epoch)  # fmt: skip

    async def _load_all(self, step: Step) -> dict[Copy, str]:
        """Loads a step's copies, on all servers at the same time; the digest of each."""
        servers = by_server(step.loads)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._load(server, slots))
                    for server, slots in servers.items()
                ]
        except BaseExceptionGroup as failures:
            raise first_mesh_error(failures) from None
        return {copy: digest for task in tasks for copy, digest in task.result().items()}

    async def _load(self, server: str, slots: list[Slot]) -> dict[Copy, str]:
        request = expert_pb2.LoadSlotsRequest(layers=layer_slots(slots))
        answer = await self._call(server, "LoadSlots", request, _LOAD_S)
        return dict(zip((Copy(server, slot) for slot in slots), answer.slot_digests, strict=True))

    async def _digests(self, step: Step) -> dict[Slot, dict[str, str]]:
        """What other servers say of the slots that a step loads, by slot and server."""
        slots = {copy.slot for copy in step.loads}
        found: dict[Slot, dict[str, str]] = {slot: {} for slot in slots}
        holders = [name for name, held in self._controller.shown().items() if held & slots]
        for server in holders:
            request = expert_pb2.DescribeShardRequest()
            shard = await self._call(server, "DescribeShard", request, _CALL_S)
            for slot, digest in _digests_of(shard).items():
                if slot in slots:
                    found[slot][server] = digest
        return found

    async def _is_used(self, epoch: int) -> bool:
        """Waits until no router uses an older placement; whether that came about in ample time."""
        deadline = Deadline.after(_SWITCH_S)
        while deadline.remaining > 0:
            if self._controller.is_used_everywhere(epoch, time.monotonic()):
                return True
            await asyncio.sleep(_POLL_S)
        return False

    async def _drop_all(self, copies: Iterable[Copy]) -> None:
        """Drops copies that are leaving; those that cannot be now, `clean` drops later."""
        for server, slots in by_server(copies).items():
            request = expert_pb2.DropSlotsRequest(layers=layer_slots(slots))
            try:
                await self._call(server, "DropSlots", request, _CALL_S)
            except MeshError as error:
                _log.warning("slots stay on %s for now: %s", server, error.message)

    async def clean(self) -> None:
        """Drops what a migration could not, or a controller that was killed: until cancelled."""
        while True:
            await asyncio.sleep(_CLEAN_S)
            controller = self._controller
            ready = controller.shown()
            leaving = {copy for copy in controller.leaving() if copy.server in ready}
            if (
                leaving
                and not self._busy
                and controller.is_used_everywhere(controller.epoch, time.monotonic())
            ):
                await self._drop_all(leaving)

    async def _call(self, server: str, method: str, request: Any, timeout_s: float) -> Any:
        return await self.call(
            self._controller.endpoint(server), server, method, request, timeout_s
        )

    async def call(
        self, endpoint: str, server: str, method: str, request: Any, timeout_s: float
    ) -> Any:
        """Calls an expert server. Raises what it answers, with its name."""
        channel = open_channel(endpoint)
        try:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            return await getattr(stub, method)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            meant = status.from_call(error, f"expert server {server} at {endpoint}")
            raise meant.again(f"{server}: {meant.message}") from None
        finally:
            await channel.close()


def _digests_of(shard: expert_pb2.DescribeShardResponse) -> Mapping[Slot, str]:
    """Digests come in the order of the shard's layers and their experts; none until it is ready."""
    slots = slots_of(shard.layers)
    if len(slots) != len(shard.slot_digests):
        raise UnavailableError(f"expert server {shard.server_id} loads or drops slots: try again")
    return dict(zip(slots, shard.slot_digests, strict=True))
