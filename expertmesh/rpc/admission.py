"""What one server takes in at a time."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from expertmesh.config import RpcConfig
from expertmesh.errors import BY_REASON, InternalError, OverloadedError, UnavailableError

_log = logging.getLogger(__name__)
OK = "OK"  # how a request ended, where the others are an error's `reason`
RETRY_AFTER_S = 0.05  # a queue of ours empties within some tens of milliseconds


class Admission:
    """What one server has in flight, over all its streams and unary calls: bounded."""

    def __init__(self, config: RpcConfig) -> None:
        self._config = config
        self.frames = 0
        self.bytes = 0
        self.outcomes = dict.fromkeys((OK, *BY_REASON), 0)  # requests since the start
        self.draining = False
        self.shared_streams = 0  # open ones whose callers lend memory
        self.streams: set[asyncio.Task[Any]] = set()  # the reading task of each open stream
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def max_shared_bytes(self) -> int:
        """The largest memory that a caller may share; 0 for none."""
        return self._config.max_shared_bytes

    @property
    def max_request_bytes(self) -> int:
        """The largest hidden states of one request."""
        return self._config.max_request_bytes

    @property
    def credit(self) -> tuple[int, int]:
        """(frames, bytes) that one stream may have in flight: at most half of all that there is.

        A client has an answer before its place here is free, and may have sent as much again.
        """
        config = self._config
        frames = min(config.stream_frames, max(1, config.max_inflight_frames // 2))
        return frames, min(config.stream_bytes, config.max_inflight_bytes // 2)

    def enter(self, size: int) -> None:
        """Takes one request in. Raises OverloadedError or UnavailableError."""
        if self.draining:
            raise UnavailableError("the server is stopping: ask another", retry_after_s=1.0)
        config = self._config
        if self.frames >= config.max_inflight_frames:
            raise OverloadedError(
                f"{self.frames} requests are in flight, the limit is {config.max_inflight_frames}:"
                " retry later or elsewhere",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.bytes and self.bytes + size > config.max_inflight_bytes:
            raise OverloadedError(
                f"requests in flight hold {self.bytes} bytes, the limit is "
                f"{config.max_inflight_bytes}: retry later or elsewhere",
                retry_after_s=RETRY_AFTER_S,
            )
        self.frames += 1
        self.bytes += size
        self._idle.clear()

    def leave(self, size: int) -> None:
        """The request has been answered or given up."""
        self.frames -= 1
        self.bytes -= size
        if self.frames == 0:
            self._idle.set()

    def ended(self, outcome: str) -> None:
        """Counts one request: OK, or the reason of the error that it was answered with."""
        known = outcome if outcome in self.outcomes else InternalError.reason
        self.outcomes[known] += 1

    async def drain(self, timeout_s: float) -> None:
        """Takes no more in, waits at most that long for what is in flight, and ends the streams."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("stopping with %d requests in flight", self.frames)
        for reader in list(self.streams):
            reader.cancel()
