"""Load for a cluster, and what its processes use meanwhile."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Request = Callable[[], Awaitable[object]]
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Block:
    """Some requests of every client, one after the other, the clients at the same time."""

    latencies_ms: list[float]
    requests_per_s: float


async def run_block(clients: Sequence[Request], requests: int) -> Block:
    """So many requests of each client."""
    latencies: list[float] = []

    async def repeat(request: Request) -> None:
        for _ in range(requests):
            took_ms = await timed_ms(request)
            latencies.append(took_ms)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request in clients:
            group.create_task(repeat(request))
    return Block(latencies, len(latencies) / (time.perf_counter() - start))


async def run_beside(request: Request, beside: Request | None, seconds: float) -> list[float]:
    """Latencies in ms of one client for that long, another one asking `beside` all the time."""
    latencies: list[float] = []
    asking = asyncio.ensure_future(_for_ever(beside)) if beside is not None else None
    end = time.perf_counter() + seconds
    try:
        while time.perf_counter() < end:
            latencies.append(await timed_ms(request))
            if asking is not None and asking.done():
                asking.result()
    finally:
        if asking is not None:
            asking.cancel()
            await asyncio.wait((asking,))
    return latencies


async def _for_ever(request: Request) -> None:
    while True:
        await request()


async def timed_ms(request: Request) -> float:
    """How long one request takes."""
    start = time.perf_counter()
    await request()
    return 1e3 * (time.perf_counter() - start)


def cpu_seconds(pid: int) -> float:
    """What a process has used of all cores since its start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def anonymous_bytes(pid: int) -> int:
    """RssAnon: pages of a process's own, not the file-backed ones that the system can drop."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} has ended")
