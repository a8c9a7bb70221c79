"""A gRPC server of ours: method table, health, reflection, graceful stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from expertmesh.codec.messages import Codec, decode_whole, encode_whole
from expertmesh.config import RpcConfig
from expertmesh.errors import (
    CancelledRequestError,
    ConfigError,
    InvalidRequestError,
    MeshError,
)
from expertmesh.rpc import forks, status
from expertmesh.rpc.address import format_address, parse_host
from expertmesh.rpc.admission import OK, Admission
from expertmesh.rpc.answering import Handler, answer_in_time
from expertmesh.rpc.channel import FRAME_OPTION, max_message_bytes
from expertmesh.rpc.data_port import DataPort
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.own_address import listening_host
from expertmesh.rpc.served_frames import FrameProtocol
from expertmesh.rpc.session import FrameSession
from expertmesh.telemetry.exposition import MetricsServer

LIVENESS = "liveness"  # what health is asked for by who restarts a process that hangs
_CLOSE_S = 0.5  # for streams that have ended to be closed on the wire too


def unary(handle: Handler, request_type: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """A control RPC with generated messages."""

    async def call(buffer: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            request = parse(request_type, buffer)
            deadline = Deadline.after(context.time_remaining())
            return await answer_in_time(handle, request, deadline)
        except MeshError as error:
            await context.abort_with_status(status.to_status(error))

    return grpc.unary_unary_rpc_method_handler(
        call,
        response_serializer=lambda message: message.SerializeToString(),
    )


def parse(request_type: Any, buffer: bytes) -> Any:
    """A generated message from its bytes. Raises InvalidRequestError."""
    try:
        return request_type.FromString(buffer)
    except DecodeError:
        name = request_type.DESCRIPTOR.name
        raise InvalidRequestError(f"the request is not a {name}: see the .proto") from None


def unary_tensor(protocol: FrameProtocol) -> grpc.RpcMethodHandler[Any, Any]:
    """A data RPC with one whole message each way."""
    admission = protocol.admission

    async def call(buffer: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        size = len(buffer)
        entered = False
        outcome = CancelledRequestError.reason
        try:
            request = decode_whole(protocol.request_codec, buffer, admission.max_request_bytes)
            admission.enter(size)
            entered = True
            deadline = Deadline.after(context.time_remaining())
            response = await answer_in_time(protocol.handle, request, deadline)
            codec: Codec[Any] = protocol.response_codec
            encoded = encode_whole(codec, response)
            outcome = OK
            return encoded
        except MeshError as error:
            outcome = error.reason
            await context.abort_with_status(status.to_status(error))
            raise
        finally:
            admission.ended(outcome)
            if entered:
                admission.leave(size)

    return grpc.unary_unary_rpc_method_handler(call)


def stream_tensor(protocol: FrameProtocol) -> grpc.RpcMethodHandler[Any, Any]:
    """A data RPC whose stream carries frames."""

    async def call(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await FrameSession(context, protocol).run()

    return grpc.stream_stream_rpc_method_handler(call)


class GrpcServer:
    """One listening server, with its metrics beside it. Used from one event loop."""

    def __init__(
        self,
        config: RpcConfig,
        admission: Admission,
        metrics: MetricsServer | None = None,
        data_port: DataPort | None = None,
    ) -> None:
        forks.use_grpc()
        self._config = config
        self._admission = admission
        self._data_port = data_port
        self._metrics = metrics
        self._health = health_aio.HealthServicer()
        self._names: list[str] = []
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", max_message_bytes(config)),
                FRAME_OPTION,
                # Else two servers given the same port would share its connections silently.
                ("grpc.so_reuseport", 0),
                # Clients of ours ping every 20 s, with or without calls.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        self.port = 0

    def add(self, name: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        """Serves the methods of one service, by its full name."""
        self._names.append(name)
        generic = grpc.method_handlers_generic_handler(name, dict(handlers))
        self._server.add_generic_rpc_handlers((generic,))

    async def start(self) -> None:
        """Binds and listens; `port` is known afterwards. Raises ConfigError when it cannot."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*self._names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
             reflection.SERVICE_NAME),
            self._server,
        )  # fmt: skip
        host = listening_host(parse_host(self._config.host))
        wanted = format_address(host, self._config.port)
        if self._metrics is not None:
            await self._metrics.start()
        try:
            self.port = self._server.add_insecure_port(wanted)
            if self._data_port is not None:
                await self._data_port.start()
        except (RuntimeError, ConfigError) as error:
            if self._metrics is not None:
                await self._metrics.stop()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"cannot listen on {wanted}: {error}; choose another port") from None
        await self.set_serving(False)
        # Whoever is answered at all is answered by the event loop: it turns.
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """What health checks are told."""
        state = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._names):
            await self._health.set(name, state)

    async def stop(self) -> None:
        """Health NOT_SERVING, no new requests, those in flight end, then the port closes."""
        await self._health.enter_graceful_shutdown()
        await self._admission.drain(self._config.drain_s)
        # Streams have been ended, from here: give their last messages time to leave.
        await self._server.stop(_CLOSE_S)
        if self._data_port is not None:
            self._data_port.stop()
        if self._metrics is not None:
            await self._metrics.stop()
