"""Where callers of our streams may open a data connection beside the stream, and how they do.

A caller asks for one in the metadata of its call, is told port and token in the stream's initial
metadata, connects, says the token, and is welcomed. Until then, and for good where anything of this
fails, the stream itself carries the frames. docs/protocol.md has it for other clients.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from expertmesh.codec.wire import Buffer
from expertmesh.config import DataConnectionMode, RpcConfig
from expertmesh.errors import ConfigError
from expertmesh.rpc.address import format_address, parse_address, parse_host
from expertmesh.rpc.channel import max_message_bytes
from expertmesh.rpc.data_connection import DataConnection
from expertmesh.rpc.own_address import EVERYWHERE, everywhere_socket, listening_host
from expertmesh.v1.tensor_pb2 import (
    DataConnectionAnswer,
    DataConnectionHello,
    DataConnectionOffer,
    DataConnectionWelcome,
)

_log = logging.getLogger(__name__)
METADATA_KEY = "expertmesh-data-bin"
_TOKEN_BYTES = 16
_HELLO_BYTES = 64  # nobody who says more is one of ours
_HELLO_S = 5.0  # who connects says its token so soon, or is cut off
_MAX_STRANGERS = 256  # connections that have not said a token yet
_CONNECT_S = 5.0  # a firewall may drop what it does not know: nothing waits for this
_ANY_FRAME = 0
_MAX_ANSWER_BYTES = (1 << 31) - 1  # what a server answers is as long as what it was asked
Attach = Callable[[DataConnection], None]


class DataPort:
    """A listening socket, and the streams that expect a connection there."""

    @classmethod
    def of(cls, config: RpcConfig) -> DataPort | None:
        """None where the configuration wants none."""
        return cls(config) if config.data_connections == "auto" else None

    def __init__(self, config: RpcConfig) -> None:
        self._host, self._wanted = listening_host(parse_host(config.host)), config.data_port
        self._max_message_bytes = max_message_bytes(config)
        self._expected: dict[bytes, Attach] = {}
        self._strangers: set[DataConnection] = set()
        self._server: asyncio.Server | None = None
        self.port = 0  # once started

    async def start(self) -> None:
        """Binds and listens. Raises ConfigError when it cannot."""
        loop = asyncio.get_running_loop()
        try:
            if self._host == EVERYWHERE:  # asyncio would take IPv6 alone
                self._server = await loop.create_server(
                    self._stranger, sock=everywhere_socket(self._wanted)
                )
            else:
                self._server = await loop.create_server(self._stranger, self._host, self._wanted)
        except (OSError, OverflowError) as error:
            where = format_address(self._host, self._wanted)
            raise ConfigError(
                f"cannot listen on {where} for data connections: {error}; "
                "choose another data port, or 0 for any free one"
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]

    def answer(self, metadata: Any, attach: Attach) -> tuple[tuple[str, bytes], ...]:
        """What to answer a stream's metadata with; nothing where it asks for no connection.

        `attach` is called with the connection once it is there, but not after `forget`. It is then
        the stream's, to be welcomed, and to be closed at last.
        """
        if self._server is None or not any(key == METADATA_KEY for key, _ in metadata or ()):
            return ()
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._expected[token] = attach
        answer = DataConnectionAnswer(port=self.port, token=token)
        return ((METADATA_KEY, answer.SerializeToString()),)

    def forget(self, attach: Attach) -> None:
        """The stream has ended."""
        for token in [token for token, each in self._expected.items() if each == attach]:
            del self._expected[token]

    def _stranger(self) -> DataConnection:
        """A connection that has to say its token first."""
        connection = DataConnection(_HELLO_BYTES)
        if len(self._strangers) >= _MAX_STRANGERS:
            connection.abort()
            return connection
        self._strangers.add(connection)
        timer = asyncio.get_running_loop().call_later(_HELLO_S, connection.abort)

        def gone() -> None:
            timer.cancel()
            self._strangers.discard(connection)

        def greet(message: Buffer) -> None:
            gone()
            self._greet(connection, message)

        connection.on_message, connection.on_lost = greet, gone
        return connection

    def _greet(self, connection: DataConnection, message: Buffer) -> None:
        """Gives the connection to the stream whose token was said."""
        try:
            token = DataConnectionHello.FromString(bytes(message)).token
        except DecodeError:
            token = b""
        attach = self._expected.pop(token, None)
        if attach is None:
            connection.abort()
            return
        connection.max_message_bytes = self._max_message_bytes
        attach(connection)

    def stop(self) -> None:
        """Takes no more connections; those of streams are the streams' to close."""
        self._expected.clear()
        for stranger in list(self._strangers):
            stranger.abort()
        if self._server is not None:
            self._server.close()


def welcome(connection: DataConnection) -> None:
    """Tells the caller that frames are taken from now on."""
    connection.outbox.put(_ANY_FRAME, iter((DataConnectionWelcome().SerializeToString(),)))


def host_of(endpoint: str, mode: DataConnectionMode = "auto") -> str:
    """Where to connect to beside a stream to "host:port"; empty for nowhere."""
    if mode != "auto":
        return ""
    try:
        return parse_address(endpoint).host
    except ConfigError:  # gRPC takes more than that: a proxy's socket, for one
        return ""


def offer() -> tuple[tuple[str, bytes], ...]:
    """The metadata that asks for a data connection."""
    return ((METADATA_KEY, DataConnectionOffer().SerializeToString()),)


async def connect(host: str, metadata: Any) -> DataConnection | None:
    """The connection that a stream's initial metadata allows; None where it cannot be had."""
    answers = [value for key, value in metadata or () if key == METADATA_KEY]
    if not answers:
        return None
    try:
        answer = DataConnectionAnswer.FromString(answers[0])
    except DecodeError:
        return None
    reason = "refused"
    try:
        async with asyncio.timeout(_CONNECT_S):
            # A name may have many addresses: the stream leads to one, which alone knows the token.
            for address in await _addresses(host, answer.port):
                try:
                    connection = await _greeted(*address, answer.token)
                except OSError as error:
                    reason = str(error)
                    continue
                if connection is not None:
                    return connection
    except OSError as error:  # a TimeoutError among them
        reason = str(error) or "no answer"
    where = format_address(host, answer.port)
    _log.info("no data connection to %s (%s): gRPC it is", where, reason)
    return None


async def _addresses(host: str, port: int) -> list[tuple[str, int]]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((str(address[0]), int(address[1])) for *_, address in found))


async def _greeted(host: str, port: int, token: bytes) -> DataConnection | None:
    """A connection to that address; None where it does not welcome the token."""
    loop = asyncio.get_running_loop()
    welcomed: asyncio.Future[bool] = loop.create_future()
    connection = DataConnection(_MAX_ANSWER_BYTES)

    def settle(outcome: bool) -> None:
        if not welcomed.done():
            welcomed.set_result(outcome)

    connection.on_message = lambda _: settle(True)
    connection.on_lost = lambda: settle(False)
    hello = DataConnectionHello(token=token).SerializeToString()
    connection.outbox.put(_ANY_FRAME, iter((hello,)))
    try:
        await loop.create_connection(lambda: connection, host, port)
        if await welcomed and not connection.lost:
            return connection
    except BaseException:
        connection.abort()
        raise
    connection.abort()
    return None
