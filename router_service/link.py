"""One router's connection to one expert server, kept up for as long as the server is announced."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

import grpc
import grpc.aio

from expertmesh import dispatch
from expertmesh.codec import messages, narrow
from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.config import RouterConfig
from expertmesh.errors import MeshError, MismatchError, UnavailableError
from expertmesh.model import PROTOCOL_VERSION
from expertmesh.rpc import data_port, status
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.lending import Lender
from expertmesh.rpc.narrowing import ask_narrow
from expertmesh.rpc.stream import FrameStream
from expertmesh.v1 import expert_pb2, router_pb2
from router_service.standing import Standing, expected_s

_log = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 5.0  # a node that does not answer: try again, it may have moved meanwhile


class ServerLink:
    """Connects, checks who answers, reconnects; `standing` is what is known of the server."""

    def __init__(
        self,
        announced: router_pb2.ServerStatus,
        digest: str,
        config: RouterConfig,
        on_change: Callable[[], None],
    ) -> None:
        self.announced = announced
        self.error = ""
        self.answered_rows = 0
        self._digest = digest
        self._config = config
        self._wire_dtype = narrow.wire_dtype(config.wire_dtype)
        self._on_change = on_change
        self._stream: FrameStream | None = None
        self._moved = asyncio.Event()
        self.standing = Standing(config.hedge_after_s, config.hedge_factor)

    @property
    def connected(self) -> bool:
        """Whether requests can be sent now."""
        return self._stream is not None and not self._stream.broken.done()

    @property
    def lost(self) -> bool:
        """Whether the controller has not heard it for a while. It may still be there for us."""
        return self.announced.state == "lost"

    @property
    def doubted(self) -> bool:
        """Whether it is left out for any number of rows."""
        return self.lost or self.standing.suspected

    def left_out(self, rows: int) -> bool:
        """Whether it is asked for so many rows only where no other server can be."""
        return self.lost or self.standing.is_suspect(rows)

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered."""
        return self._stream.in_flight if self._stream is not None else 0

    @property
    def transport(self) -> str:
        """See `FrameStream.transport`."""
        return self._stream.transport if self._stream is not None else "grpc"

    def update(self, announced: router_pb2.ServerStatus) -> None:
        """Takes what the directory now says; another endpoint or incarnation reconnects."""
        before = self.announced
        self.announced = announced
        if (before.endpoint, before.incarnation) != (announced.endpoint, announced.incarnation):
            self._moved.set()

    def suspect(self, rows: int, patience_s: float) -> None:
        """A replica has answered so many rows, about which this server is silent."""
        if not self.standing.suspected:
            _log.warning("server %s answers nothing: it is left out", self.announced.server_id)
        self.standing.suspect(time.monotonic(), rows, patience_s)
        self._on_change()

    def patience_s(self, request: ExecuteRequest, tried: int = 0) -> float:
        """How long to wait for the answer before the server is overdue; see Standing."""
        rows = request.hidden_states.shape[0]
        if self.standing.knows(rows):
            return self.standing.patience_s(rows, 0.0, tried)
        pairs, bytes_ = request.expert_ids.size, request.hidden_states.nbytes
        expected = expected_s(rows, pairs, bytes_, self.announced.pairs_per_s)
        return self.standing.patience_s(rows, expected, tried)

    def ask(self, request: ExecuteRequest, deadline: Deadline) -> asyncio.Future[ExecuteResponse]:
        """Asks the server; see `FrameStream.begin`. Raises UnavailableError."""
        if self._stream is None:
            raise UnavailableError(f"expert server {self.announced.server_id} is not connected")
        if self._wire_dtype is None:
            return self._stream.begin(request, deadline)
        stream, who = self._stream, f"expert server {self.announced.server_id}"
        asked = ask_narrow(
            request,
            self._wire_dtype,
            who,
            lambda narrowed: stream.begin(narrowed, deadline),
            dispatch.partial_dtype,
        )
        return asyncio.ensure_future(asked)

    def answered(self, asked_at: float, rows: int, patience_s: float) -> None:
        """Notes an answer to what was asked for then."""
        self.answered_rows += rows
        if self.standing.answered(time.monotonic(), asked_at, rows, patience_s):
            _log.info("server %s answers again", self.announced.server_id)
            self._on_change()

    async def run(self) -> None:
        """Connects and reconnects until cancelled."""
        pause = self._config.reconnect_pause_s
        while True:
            self._moved.clear()
            endpoint = self.announced.endpoint
            channel = open_channel(endpoint)
            try:
                await self._serve(channel, endpoint)
                pause = self._config.reconnect_pause_s
            except MeshError as error:
                if error.message != self.error:
                    _log.warning("server %s: %s", self.announced.server_id, error.message)
                self.error = error.message
            finally:
                await self._disconnect()
                await channel.close()
            try:
                async with asyncio.timeout(pause):
                    await self._moved.wait()
            except TimeoutError:
                pause = min(2 * pause, self._config.reconnect_max_pause_s)

    async def _serve(self, channel: grpc.aio.Channel, endpoint: str) -> None:
        await self._check(channel, endpoint)
        self._stream = FrameStream(
            channel,
            "/expertmesh.v1.ExpertService/ExecuteStream",
            messages.EXECUTE_REQUEST,
            messages.EXECUTE_RESPONSE,
            f"expert server {self.announced.server_id} at {endpoint}",
            Lender.of(self._config.shared_memory, views=True),
            data_port.host_of(endpoint, self._config.data_connections),
        )
        self.error = ""
        self.standing.renew()
        self._on_change()
        moved = asyncio.ensure_future(self._moved.wait())
        try:
            await asyncio.wait((moved, self._stream.broken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            moved.cancel()
        if self._stream.broken.done():
            self.error = self._stream.broken.result().message

    async def _check(self, channel: grpc.aio.Channel, endpoint: str) -> None:
        describe = channel.unary_unary(
            "/expertmesh.v1.ExpertService/DescribeShard",
            request_serializer=expert_pb2.DescribeShardRequest.SerializeToString,
            response_deserializer=expert_pb2.DescribeShardResponse.FromString,
        )
        try:
            shard = await describe(expert_pb2.DescribeShardRequest(), timeout=_CONNECT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise status.from_call(error, f"expert server at {endpoint}") from None
        refuse_mismatch(
            f"expert server {shard.server_id} at {endpoint}",
            shard.protocol_version,
            shard.checkpoint_digest,
            self._digest,
        )
        if shard.server_id != self.announced.server_id:
            raise MismatchError(
                f"{endpoint} answers as {shard.server_id!r}, expected "
                f"{self.announced.server_id!r}: the directory is behind, it is asked again"
            )

    async def _disconnect(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self._on_change()
            await stream.close()


def refuse_mismatch(who: str, protocol: int, digest: str, own_digest: str) -> None:
    """Raises MismatchError when a peer belongs to another fleet."""
    if protocol != PROTOCOL_VERSION:
        raise MismatchError(
            f"{who} speaks protocol version {protocol}, this router {PROTOCOL_VERSION}: run the "
            "same release of expertmesh everywhere"
        )
    if digest != own_digest:
        raise MismatchError(
            f"{who} serves checkpoint {digest[:12]}, this router {own_digest[:12]}: start every "
            "server from the same files"
        )


def rate(link: ServerLink) -> float:
    """Relative share of new rows for a server: less while requests wait there."""
    return 1.0 / (1.0 + math.sqrt(link.in_flight))
