"""One router as a client knows it: a channel, a stream, and whether it can be relied on.

A router does nothing but pass on, so that it is silent about a request says little: its servers may
take long. But a router that lives answers `Describe` at once. So a client that knows another one
asks that of a router from which nothing has come for a while: without an answer the router is
suspected, what it was asked for goes to others, and it is asked again until it answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from expertmesh.codec.messages import (
    FORWARD_REQUEST,
    FORWARD_RESPONSE,
    ForwardRequest,
    ForwardResponse,
)
from expertmesh.config import DataConnectionMode, SharedMemoryConfig
from expertmesh.errors import UnavailableError
from expertmesh.rpc import data_port, forks, heap, status
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.lending import Lender
from expertmesh.rpc.stream import FrameStream
from expertmesh.rpc.tasks import TaskSet
from expertmesh.v1 import router_pb2 as pb
from expertmesh.v1 import router_pb2_grpc

_log = logging.getLogger(__name__)
SILENT_S = 0.15  # nothing has come for so long, though something is awaited: is the router there?
_DESCRIBE_S = 0.15  # a router that lives has answered by then, also on a busy host
_BYTES_PER_S = 25e6  # what travels delays both: a quarter of a gigabit network
_LATE_S = 0.05  # a timer that is so late says that this process was busy, not that a router hangs:
_TRIES = 3  # it is asked again, but not for ever
_SUSPECT_PAUSE_S = 0.1  # between two questions to a suspect
_SUSPECT_DESCRIBE_S = 2.0  # how long it may take to answer one: it answers when it goes on


class RouterLink:
    """One router: a channel, and a stream that is reopened when it breaks. Of one event loop."""

    def __init__(
        self,
        address: str,
        shared_memory: SharedMemoryConfig,
        data_connections: DataConnectionMode,
        proxy: str,
        on_judged: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_judged` is called when the router is suspected or trusted again, and when a suspect
        has been silent about requests that were sent to it all the same."""
        forks.use_grpc()
        self.address = address
        self.suspected = False
        self._on_judged = on_judged
        self._shared_memory = shared_memory
        # Data connections are direct: who has to go through a proxy cannot make them.
        self._data_host = data_port.host_of(address, "off" if proxy else data_connections)
        heap.keep_freed_memory()
        self._channel = open_channel(address, proxy)
        self.stub = router_pb2_grpc.RouterServiceStub(self._channel)
        self._stream: FrameStream | None = None
        self._tasks = TaskSet()
        self._looking = False  # whether a look is due, or under way
        self._look_timer: asyncio.TimerHandle | None = None
        self._busy_since = 0.0  # when something was last asked for while nothing was awaited
        self._bytes = 0  # of the requests that are awaited

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered."""
        return self._stream.in_flight if self._stream is not None else 0

    async def stream(self) -> FrameStream:
        """The open stream."""
        if self._stream is None or self._stream.broken.done():
            old, self._stream = self._stream, FrameStream(
                self._channel,
                "/expertmesh.v1.RouterService/ForwardStream",
                FORWARD_REQUEST,
                FORWARD_RESPONSE,
                f"router at {self.address}",
                Lender.of(self._shared_memory, views=False),
                self._data_host,
            )  # fmt: skip
            if old is not None:
                await old.close()
        return self._stream

    async def forward(
        self, request: ForwardRequest, deadline: Deadline, *, judged: bool
    ) -> ForwardResponse:
        """The router's answer. With `judged`, UnavailableError when it is silent and suspected,
        and whoever is told of that calls `give_up`."""
        stream = await self.stream()
        if not judged:
            answer: ForwardResponse = await stream.call(request, deadline)
            return answer
        if not stream.in_flight:
            self._busy_since = time.monotonic()
        size = request.hidden_states.nbytes
        self._bytes += size
        if not self._looking:
            self._look_in(SILENT_S)
        try:
            answer = await stream.call(request, deadline)
        finally:
            self._bytes -= size
        return answer

    async def control(
        self, method: Any, request: Any, deadline: Deadline, silent_s: float | None = None
    ) -> Any:
        """A unary call, its failure as a MeshError. With `silent_s`, UnavailableError too when
        the router then answers nothing at all."""
        call = asyncio.ensure_future(self._control(method, request, deadline))
        try:
            if silent_s is not None and not await self._ends_or_lives(call, silent_s):
                self._suspect()
                raise self._silent()
            return await call
        finally:
            if not call.cancel() and not call.cancelled():
                call.exception()

    async def _ends_or_lives(self, call: asyncio.Future[Any], silent_s: float) -> bool:
        """Whether a call has ended before a moment came when the router answered nothing at all."""
        while not (await asyncio.wait((call,), timeout=silent_s))[0]:
            lives = asyncio.ensure_future(self._describes(silent_s))
            try:
                await asyncio.wait((call, lives), return_when=asyncio.FIRST_COMPLETED)
                if not call.done() and not lives.result():
                    return False
            finally:
                lives.cancel()
        return True

    async def _control(self, method: Any, request: Any, deadline: Deadline) -> Any:
        try:
            return await method(request, timeout=deadline.timeout)
        except grpc.aio.UsageError:
            raise UnavailableError(f"the connection to {self.address} has been closed") from None
        except grpc.aio.AioRpcError as error:
            raise status.from_call(error, f"router at {self.address}") from None

    def give_up(self) -> None:
        """What the router was asked for fails with UnavailableError, and the router is told."""
        if self._stream is not None:
            self._stream.give_up(self._silent())

    def _silent(self) -> UnavailableError:
        return UnavailableError(
            f"router at {self.address} does not answer: is its process stopped, or its node gone?",
            retry_after_s=1.0,
        )

    def _look_in(self, seconds: float) -> None:
        self._looking = True
        self._look_timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Whether anything has come lately, while something is awaited."""
        stream = self._stream
        if stream is None or stream.broken.done() or not stream.in_flight:
            self._looking = False  # the next request looks again
            return
        left_s = self._silent_at(stream) - time.monotonic()
        if left_s > 0:
            self._look_in(left_s)
        elif self.suspected:
            self._on_judged()
            self._look_in(SILENT_S)
        else:
            self._tasks.spawn(self._judge(stream), f"judge {self.address}")

    def _silent_at(self, stream: FrameStream) -> float:
        heard_at = max(stream.heard_at, self._busy_since)
        return heard_at + SILENT_S + self._bytes / _BYTES_PER_S

    async def _judge(self, stream: FrameStream) -> None:
        heard_at = stream.heard_at
        try:
            if await self._describes(_DESCRIBE_S + self._bytes / _BYTES_PER_S):
                self._busy_since = time.monotonic()  # that was heard, too
            elif stream.heard_at == heard_at:
                self._suspect()
        finally:  # whatever happens: without a look that is due the router is never judged again
            self._look_in(SILENT_S)

    async def _describes(self, timeout_s: float) -> bool:
        """Whether the router answers a question that it need not think about."""
        for _ in range(_TRIES):
            began = time.monotonic()
            if await self._answers(timeout_s):
                return True
            if time.monotonic() - began < timeout_s + _LATE_S:
                break  # else what it says may wait to be read
        return False

    async def _answers(self, timeout_s: float) -> bool:
        try:
            await self.stub.Describe(pb.DescribeRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            unheard = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            return error.code() not in unheard
        return True

    def _suspect(self) -> None:
        if not self.suspected:
            self.suspected = True
            _log.warning("router at %s does not answer: others are asked", self.address)
            self._tasks.spawn(self._until_it_answers(), f"probe {self.address}")
            self._on_judged()

    async def _until_it_answers(self) -> None:
        while not await self._answers(_SUSPECT_DESCRIBE_S):  # noqa: ASYNC110 (it has no event)
            await asyncio.sleep(_SUSPECT_PAUSE_S)
        self.suspected = False
        _log.info("router at %s answers again", self.address)
        self._on_judged()

    async def close(self) -> None:
        """Closes stream and channel."""
        await self._tasks.close()
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()
