"""The device thread: computes one request after the other, never on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from expert_service.shard import ExpertShard
from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.errors import OverloadedError
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.session import RETRY_AFTER_S
from expertmesh.telemetry.metric import Histogram

_T = TypeVar("_T")


class DeviceRunner:
    """Owns one thread and a bounded queue before it."""

    def __init__(self, shard: ExpertShard, threads: int, max_queue: int) -> None:
        """`threads` is what torch may use for each operation on the CPU."""
        self._shard = shard
        self._max_queue = max_queue
        self._queued = 0
        self.queue_seconds = Histogram()
        self.compute_seconds = Histogram()
        self.rows = 0  # computed since the start
        self._executor = ThreadPoolExecutor(
            1, "device", initializer=torch.set_num_threads, initargs=(threads,)
        )

    async def execute(self, request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
        """Computes one request in its turn.

        Raises OverloadedError when the queue is full, DeadlineError when the turn comes too late,
        and what `ExpertShard.execute` raises.
        """
        if self._queued >= self._max_queue:
            raise OverloadedError(
                f"{self._queued} requests wait for the device, the limit is {self._max_queue}: "
                "retry later or on a replica",
                retry_after_s=RETRY_AFTER_S,
            )
        self._queued += 1
        try:
            response = await self.call(self._compute, request, deadline, time.perf_counter_ns())
        finally:
            self._queued -= 1
        self.queue_seconds.observe(response.queue_us / 1e6)
        self.compute_seconds.observe(response.compute_us / 1e6)
        self.rows += len(request.hidden_states)
        return response

    @property
    def queued(self) -> int:
        """Requests before the device and on it."""
        return self._queued

    async def call(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Runs anything on the device thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, *arguments)

    def _compute(
        self, request: ExecuteRequest, deadline: Deadline, queued_at_ns: int
    ) -> ExecuteResponse:
        deadline.check()
        started_at_ns = time.perf_counter_ns()
        with torch.inference_mode():
            output = self._shard.execute(
                request.layer, request.hidden_states, request.expert_ids, request.expert_weights
            )
        return ExecuteResponse(
            hidden_states=output,
            queue_us=(started_at_ns - queued_at_ns) // 1000,
            compute_us=(time.perf_counter_ns() - started_at_ns) // 1000,
        )

    def close(self) -> None:
        """Ends the thread after what it is doing."""
        self._executor.shutdown(wait=False, cancel_futures=True)
