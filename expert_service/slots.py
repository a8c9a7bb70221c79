"""Slots that come and go while requests are answered: what live migration asks of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard, Weights
from expertmesh.checkpoint import slot_digest
from expertmesh.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    MeshError,
    NoRoomError,
    UnavailableError,
)
from expertmesh.model import Slot

_ROOM = 1.3  # what loading may take over the weights themselves, as at the start
_REST = 2.0  # times what loading a slot took, before the next: in the background, not at once
_SPARE_BYTES = 256 << 20  # what other processes of the host may want meanwhile


class SlotMover:
    """Loads slots beside those that a running shard holds, and drops some. One call at a time."""

    def __init__(
        self,
        shard: ExpertShard,
        runner: DeviceRunner,
        read_expert: Callable[[Slot], Weights],
        slot_bytes: Callable[[Slot], int],
        free_bytes: Callable[[], int | None],
    ) -> None:
        """`slot_bytes` is a slot's size in memory; `free_bytes` what is free, None if unknown."""
        self._shard = shard
        self._runner = runner
        self._read_expert = read_expert
        self._slot_bytes = slot_bytes
        self._free_bytes = free_bytes
        self._lock = asyncio.Lock()

    async def load(self, slots: Sequence[Slot]) -> list[str]:
        """Holds all of these slots, or as many as before; the digest of each.

        Raises InvalidRequestError for slots that the model does not have, NoRoomError, and
        UnavailableError when the checkpoint cannot be read.
        """
        async with self._lock:
            held = self._shard.slot_digests
            missing = [slot for slot in dict.fromkeys(slots) if slot not in held]
            self._check(missing)
            try:
                for slot in missing:
                    started = time.monotonic()
                    # Reading and hashing take a thread of their own: the device's goes on.
                    weights, digest = await asyncio.to_thread(self._read, slot)
                    await self._runner.call(self._shard.add, slot, weights, digest)
                    del weights
                    # Requests have the cores to themselves in between.
                    await asyncio.sleep(_REST * (time.monotonic() - started))
            except BaseException as error:
                # Behind an `add` that nobody waits for any more: what it brings goes, too.
                await self._runner.call(self._drop_held, missing)
                if isinstance(error, CheckpointError):
                    raise UnavailableError(error.message) from None
                if isinstance(error, ConfigError):  # of the backend: its device is full
                    raise NoRoomError(error.message) from None
                raise
            digests = self._shard.slot_digests
            return [digests[slot] for slot in slots]

    async def drop(self, slots: Sequence[Slot]) -> None:
        """Holds none of these slots."""
        async with self._lock:
            await self._runner.call(self._drop_held, slots)

    def _drop_held(self, slots: Sequence[Slot]) -> None:
        """On the device thread: drops those of these slots that are held."""
        for slot in self._shard.slot_digests.keys() & set(slots):
            self._shard.drop(slot)
        self._shard.trim()

    def _check(self, slots: Sequence[Slot]) -> None:
        try:
            for slot in slots:
                self._shard.check_slot(slot)
        except MeshError as error:
            raise InvalidRequestError(error.message, field="layers") from None
        needed = int(_ROOM * sum(map(self._slot_bytes, slots)))
        free = self._free_bytes()
        if free is not None and needed + _SPARE_BYTES > free:
            raise NoRoomError(
                f"{len(slots)} slots need {needed / 2**20:.0f} MiB while they load and "
                f"{_SPARE_BYTES / 2**20:.0f} MiB are kept for others, but {free / 2**20:.0f} MiB "
                "are free on this host: move fewer experts here"
            )

    def _read(self, slot: Slot) -> tuple[Weights, str]:
        weights = self._read_expert(slot)
        return weights, slot_digest(weights)


def free_host_bytes() -> int | None:
    """Memory that this host can give without swapping; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
