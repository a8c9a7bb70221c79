"""Slots that come and go while requests are answered: what live migration asks of a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from expert_service.pacer import Pacer
from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard, Weights, return_free_memory
from expertmesh.checkpoint import slot_digest
from expertmesh.checkpoint.safetensors_file import Pause
from expertmesh.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    MeshError,
    NoRoomError,
    UnavailableError,
)
from expertmesh.model import Slot

_T = TypeVar("_T")
_ROOM = 1.3  # what loading may take over the weights themselves, as at the start
_SERVING_S = 1.0  # without a request for so long, loading may have its core to itself
_SPARE_BYTES = 256 << 20  # what other processes of the host may want meanwhile


class SlotMover:
    """Loads slots beside those that a running shard holds, and drops some. One call at a time.

    All that takes time is done by a thread of its own, in short steps with rests between them: the
    device's thread is asked only to take over what is ready, and to let go.
    """

    def __init__(
        self,
        shard: ExpertShard,
        runner: DeviceRunner,
        read_expert: Callable[[Slot, Pause], Weights],
        slot_bytes: Callable[[Slot], int],
        free_bytes: Callable[[], int | None],
        load_share: float,
    ) -> None:
        """`slot_bytes` is a slot's size in this host's memory, 0 where it is held elsewhere;
        `free_bytes` what is free there, None if unknown;
        `load_share` what loading may take of one core while requests come."""
        self._shard = shard
        self._runner = runner
        self._read_expert = read_expert
        self._slot_bytes = slot_bytes
        self._free_bytes = free_bytes
        self._load_share = load_share
        self._lock = asyncio.Lock()
        # One operation of torch on one core: the other cores are the requests'.
        self._thread = ThreadPoolExecutor(1, "slots", torch.set_num_threads, (1,))

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def load(self, slots: Sequence[Slot]) -> list[str]:
        """Holds all of these slots, or as many as before; the digest of each.

        Raises InvalidRequestError for slots that the model does not have, NoRoomError, and
        UnavailableError when the checkpoint cannot be read.
        """
        async with self._lock:
            held = self._shard.slot_digests
            missing = [slot for slot in dict.fromkeys(slots) if slot not in held]
            self._check(missing)
            pause = self._pacer()
            try:
                for slot in missing:
                    prepared, digest = await self._aside(self._read, slot, pause)
                    await self._runner.call(self._shard.add_prepared, slot, prepared, digest)
                    del prepared
            except BaseException as error:
                pause.give_up()  # the thread may read on, though nobody waits for it
                # Behind an `add` that nobody waits for any more: what it brings goes, too.
                await self._drop_held(missing)
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
            await self._drop_held(slots)

    async def _drop_held(self, slots: Sequence[Slot]) -> None:
        """Drops those of these slots that are held."""
        dropped = await self._runner.call(self._take_held, slots)
        if dropped:
            await self._aside(self._free, dropped, self._pacer())

    def _take_held(self, slots: Sequence[Slot]) -> list[object]:
        """On the device thread."""
        held = self._shard.slot_digests.keys() & set(slots)
        return [self._shard.drop(slot) for slot in held]

    async def _aside(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Runs what takes time on this mover's own thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _check(self, slots: Sequence[Slot]) -> None:
        try:
            for slot in slots:
                self._shard.check_slot(slot)
        except MeshError as error:
            raise InvalidRequestError(error.message, field="layers") from None
        needed = int(_ROOM * sum(map(self._slot_bytes, slots)))
        free = self._free_bytes()
        if needed and free is not None and needed + _SPARE_BYTES > free:
            raise NoRoomError(
                f"{len(slots)} slots need {needed / 2**20:.0f} MiB while they load and "
                f"{_SPARE_BYTES / 2**20:.0f} MiB are kept for others, but {free / 2**20:.0f} MiB "
                "are free on this host: move fewer experts here"
            )

    def _pacer(self) -> Pacer:
        return Pacer(self._load_share, lambda: self._runner.served_within(_SERVING_S))

    # What follows runs on this mover's own thread.

    def _read(self, slot: Slot, pause: Pause) -> tuple[object, str]:
        weights = self._read_expert(slot, pause)
        digest = slot_digest(weights, pause)
        return self._shard.prepare(slot, weights, pause), digest

    def _free(self, dropped: list[object], pause: Pause) -> None:
        while dropped:
            dropped.pop()
            pause()
        return_free_memory()


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
