"""A foreign client: gRPC and generated code, nothing of ours; and what it must leave behind."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from expert_service.server import ExpertServer
from expertmesh.rpc import loop
from expertmesh.rpc.admission import Admission
from expertmesh.v1 import router_pb2, tensor_pb2
from router_service.server import RouterServer
from tests.mesh import LocalMesh, wait_until

TIMEOUT_S = 20.0  # of every raw call: a hang is a failure
_NUMBERS = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float8_e4m3fn: 4,
    torch.int32: 5,
    torch.int64: 6,
}


@contextmanager
def channel_to(address: str) -> Iterator[grpc.Channel]:
    """A blocking channel without any limit of its own."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield channel


def proto(tensor: torch.Tensor, length: int | None = None) -> tensor_pb2.Tensor:
    """The generated message of a tensor, or of its first `length` bytes."""
    flat = tensor.contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return tensor_pb2.Tensor(
        data_type=_NUMBERS[tensor.dtype],  # type: ignore[arg-type]
        shape=list(tensor.shape),
        data=data[:length],
    )


def floats(message: tensor_pb2.Tensor, data: bytes | None = None) -> torch.Tensor:
    """The float32 tensor of a generated message, or of its shape and `data`."""
    raw = bytearray(message.data if data is None else data)
    if not raw:
        return torch.empty(tuple(message.shape))
    return torch.frombuffer(raw, dtype=torch.float32).view(tuple(message.shape))


class RawStream:
    """One stream whose messages are sent and received one at a time."""

    def __init__(self, method: Any) -> None:
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = method(iter(self._out.get, None), timeout=TIMEOUT_S)

    def send(self, *messages: Any) -> None:
        """Sends messages in this order."""
        for message in messages:
            self._out.put(message)

    def receive(self) -> Any:
        """The next message. Raises grpc.RpcError, StopIteration."""
        return next(self.call)

    def finish(self) -> list[Any]:
        """Says that no more follows; every message that was still to come."""
        self._out.put(None)
        return list(self.call)

    def __enter__(self) -> RawStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.put(None)
        self.call.cancel()


class RawConnection:
    """The same over a data connection, opened beside the stream as docs/protocol.md says."""

    def __init__(
        self, method: Any, answer_type: Any, token: bytes | None = None, waits: bool = True
    ) -> None:
        """Says that token instead of the stream's; `waits` for the welcome."""
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        offer = tensor_pb2.DataConnectionOffer().SerializeToString()
        self.call = method(
            iter(self._out.get, None),
            timeout=TIMEOUT_S,
            metadata=(("expertmesh-data-bin", offer),),
        )
        metadata = dict(self.call.initial_metadata())
        self.answer = tensor_pb2.DataConnectionAnswer.FromString(metadata["expertmesh-data-bin"])
        self._answer_type = answer_type
        self.socket = socket.create_connection(("127.0.0.1", self.answer.port), TIMEOUT_S)
        self.send(tensor_pb2.DataConnectionHello(token=token or self.answer.token))
        if token is None and waits:
            tensor_pb2.DataConnectionWelcome.FromString(self._read())

    def send(self, *messages: Any) -> None:
        """Sends messages in this order."""
        for message in messages:
            self.send_bytes(message.SerializeToString())

    def send_on_call(self, message: Any) -> None:
        """Sends a message on the stream itself."""
        self._out.put(message)

    def send_bytes(self, data: bytes) -> None:
        """Sends anything as one message."""
        self.socket.sendall(struct.pack("<I", len(data)) + data)

    def receive(self) -> Any:
        """The next message. Raises StopIteration at the end of the connection."""
        return self._answer_type.FromString(self._read())

    def _read(self) -> bytes:
        (length,) = struct.unpack("<I", self._read_exactly(4))
        return self._read_exactly(length)

    def _read_exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            got = self.socket.recv(length - len(data))
            if not got:
                raise StopIteration
            data += got
        return bytes(data)

    def close(self) -> None:
        """Ends stream and connection."""
        self._out.put(None)
        self.call.cancel()
        self.socket.close()


def details(error: grpc.RpcError) -> tuple[str, list[str], float | None]:
    """(reason, fields at fault, seconds to wait or None) of a failed call's rich status."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    reason, fields, delay = "", [], None
    for detail in status.details if status is not None else ():
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            assert info.domain == "expertmesh"
            reason = info.reason
        elif detail.Unpack(bad):
            fields = [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            delay = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, fields, delay


def forward(
    layer: int, hidden: torch.Tensor, frame_id: int = 1, length: int | None = None, **others: Any
) -> router_pb2.ForwardStreamRequest:
    """A stream message that starts a frame, its hidden states cut after `length` bytes."""
    body = router_pb2.ForwardRequest(layer=layer, hidden_states=proto(hidden, length))
    return router_pb2.ForwardStreamRequest(frame_id=frame_id, forward=body, **others)


def chunk(frame_id: int, data: bytes) -> router_pb2.ForwardStreamRequest:
    """A stream message that continues a frame."""
    return router_pb2.ForwardStreamRequest(
        frame_id=frame_id, chunk=tensor_pb2.TensorChunk(data=data)
    )


def admission(server: RouterServer | ExpertServer) -> Admission:
    """What a server has in flight."""
    return server._server._admission


@contextmanager
def devices_held(mesh: LocalMesh) -> Iterator[None]:
    """Every expert server's device thread waits until the block ends, from before it begins."""
    gate, held = threading.Event(), threading.Barrier(len(mesh.servers) + 1)

    def hold() -> None:
        held.wait(TIMEOUT_S)
        gate.wait()

    for server in mesh.servers:
        loop.submit(server._runner.call(hold))
    try:
        held.wait(TIMEOUT_S)
        yield
    finally:
        gate.set()


def wait_until_idle(mesh: LocalMesh) -> None:
    """Until nothing is in flight anywhere; fails when something has leaked."""
    servers = [*mesh.routers, *mesh.servers]

    def idle() -> bool:
        queues = [queue for router in mesh.routers for queue in router.router.queues]
        # A request given up leaves at once, its batch when its task has noticed.
        return all(
            (admission(server).frames, admission(server).bytes) == (0, 0) for server in servers
        ) and not any(queue.waiting or queue.running for queue in queues)

    wait_until(idle, 5.0, "idle")
