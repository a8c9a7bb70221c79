"""Slots that come and go beside a device that must not wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

from expert_service.kernels.reference import ReferenceBackend
from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard
from expert_service.slots import SlotMover
from expertmesh.checkpoint import slot_digest
from expertmesh.codec.messages import ExecuteRequest
from expertmesh.config import ExpertConfig
from expertmesh.errors import CheckpointError, NoRoomError, UnavailableError
from expertmesh.model import ExpertWeights, Fp8ExpertWeights, LayerSpec, ModelSpec, Slot
from expertmesh.rpc.deadline import Deadline

H, E = 8, 4
LAYER = LayerSpec(index=0, num_experts=E, intermediate_size=6, shared_intermediate_size=0)
SPEC = ModelSpec(model_type="t", hidden_size=H, dtype=torch.float32, layers=(LAYER,))
SLOTS = [Slot(0, 2), Slot(0, 3)]


class Backend(ReferenceBackend):
    """Notes which thread does what."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[tuple[str, str]] = []

    def _note(self, what: str) -> None:
        self.threads.append((what, threading.current_thread().name.partition("_")[0]))

    def prepare(
        self, weights: ExpertWeights | Fp8ExpertWeights, pause: Callable[[], None]
    ) -> ExpertWeights | Fp8ExpertWeights:
        self._note("prepare")
        return super().prepare(weights, pause)

    def load(self, slot: Slot, weights: ExpertWeights | Fp8ExpertWeights) -> None:
        self._note("load")
        super().load(slot, weights)

    def drop(self, slot: Slot) -> ExpertWeights:
        self._note("drop")
        return super().drop(slot)


class Reader:
    """Reads weights; on its second slot it waits for `go`, and calls `pause` before and after."""

    def __init__(self) -> None:
        self.reads: list[Slot] = []
        self.go = threading.Event()
        self.waits = threading.Event()
        self.go.set()

    def __call__(self, slot: Slot, pause: Callable[[], None] = lambda: None) -> ExpertWeights:
        self.reads.append(slot)
        if len(self.reads) == 2:
            self.waits.set()
            self.go.wait(10.0)
        pause()
        return weights_of(slot)


def weights_of(slot: Slot) -> ExpertWeights:
    generator = torch.Generator().manual_seed(slot.expert)
    gate, up = (torch.randn(6, H, generator=generator) for _ in range(2))
    return ExpertWeights(gate, up, torch.randn(H, 6, generator=generator))


def _run(
    scenario: Callable[[SlotMover, DeviceRunner, ExpertShard, Reader], Awaitable[Any]],
    slot_bytes: int = 1,
    free_bytes: int | None = None,
) -> Any:
    backend = Backend()
    shard = ExpertShard(SPEC, [Slot(0, 0)], backend)
    shard.load(weights_of, lambda slot: None)
    backend.threads.clear()

    async def run() -> Any:
        runner, reader = DeviceRunner(shard, 1, ExpertConfig()), Reader()
        mover = SlotMover(
            shard, runner, reader, lambda slot: slot_bytes, lambda: free_bytes, load_share=1.0
        )
        try:
            return await scenario(mover, runner, shard, reader)
        finally:
            mover.close()
            runner.close()

    return asyncio.run(run()), backend.threads


def test_the_device_thread_only_takes_over_and_lets_go() -> None:
    async def scenario(mover: SlotMover, _: Any, shard: ExpertShard, reader: Reader) -> Any:
        digests = await mover.load(SLOTS)
        await mover.drop(SLOTS[:1])
        return digests, shard.slots

    (digests, slots), threads = _run(scenario)

    assert digests == [slot_digest(weights_of(slot)) for slot in SLOTS]
    assert slots == (Slot(0, 0), Slot(0, 3))
    assert threads == [("prepare", "slots"), ("load", "device")] * 2 + [("drop", "device")]


def test_slots_that_find_no_room_on_the_host_are_refused_before_they_are_read() -> None:
    async def scenario(mover: SlotMover, _: Any, shard: ExpertShard, reader: Reader) -> Any:
        with pytest.raises(NoRoomError, match=r"2 slots need .* MiB are free on this host"):
            await mover.load(SLOTS)
        return reader.reads

    assert _run(scenario, slot_bytes=1, free_bytes=1 << 20)[0] == []


def test_slots_that_are_held_on_a_device_need_no_room_on_the_host() -> None:
    async def scenario(mover: SlotMover, _: Any, shard: ExpertShard, reader: Reader) -> Any:
        await mover.load(SLOTS)
        return reader.reads

    assert _run(scenario, slot_bytes=0, free_bytes=1)[0] == SLOTS


def test_requests_are_computed_while_a_slot_is_read() -> None:
    async def scenario(
        mover: SlotMover, runner: DeviceRunner, shard: ExpertShard, reader: Reader
    ) -> bool:
        reader.go.clear()
        loading = asyncio.ensure_future(mover.load(SLOTS))
        await asyncio.to_thread(reader.waits.wait, 10.0)
        ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
        request = ExecuteRequest(
            layer=0, hidden_states=torch.ones(2, H), expert_ids=ids, expert_weights=weights
        )
        await runner.execute(request, Deadline.after(10.0))
        still = not loading.done()
        reader.go.set()
        await loading
        return still

    assert _run(scenario)[0]


def test_a_load_that_is_given_up_reads_no_further_and_holds_nothing_of_it() -> None:
    async def scenario(mover: SlotMover, _: Any, shard: ExpertShard, reader: Reader) -> Any:
        reader.go.clear()
        loading = asyncio.ensure_future(mover.load([*SLOTS, Slot(0, 1)]))
        await asyncio.to_thread(reader.waits.wait, 10.0)
        loading.cancel()
        await asyncio.sleep(0)  # it has told the thread
        reader.go.set()
        await asyncio.wait((loading,))
        again = await mover.load([Slot(0, 1)])
        return loading.cancelled(), shard.slots, reader.reads, again

    (cancelled, slots, reads, again), _ = _run(scenario)

    assert cancelled
    assert slots == (Slot(0, 0), Slot(0, 1))
    assert reads == [*SLOTS, Slot(0, 1)]
    assert again == [slot_digest(weights_of(Slot(0, 1)))]


def test_a_slot_that_cannot_be_read_takes_the_others_with_it() -> None:
    async def scenario(mover: SlotMover, _: Any, shard: ExpertShard, reader: Reader) -> Any:
        def fails(slot: Slot, pause: Callable[[], None]) -> ExpertWeights:
            if slot == SLOTS[1]:
                raise CheckpointError("the disk has gone")
            return weights_of(slot)

        mover._read_expert = fails
        with pytest.raises(UnavailableError, match="the disk has gone"):
            await mover.load(SLOTS)
        return shard.slots

    assert _run(scenario)[0] == (Slot(0, 0),)
