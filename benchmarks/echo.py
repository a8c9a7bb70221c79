"""Bare gRPC streams that send every chunk back as it came: the floor of one hop, or of two.

python benchmarks/echo.py                           # prints LISTENING host:port
python benchmarks/echo.py HOST:PORT HOST:PORT       # a relay: asks all, passes one answer on
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

# Of ours: how a process polls and keeps memory, set up as in all services. Imported before grpc.
from expertmesh.rpc.heap import keep_freed_memory

# isort: split
import grpc
import grpc.aio
import uvloop

METHOD = "/echo.Echo/Stream"
CHUNK_BYTES = 1 << 20
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


async def _echo(chunks: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield chunk


class _Relay:
    """Sends every chunk to each of some echo servers, and what the last of them answers back."""

    def __init__(self, addresses: list[str]) -> None:
        self._addresses = addresses

    async def serve(self, _: object, context: Any) -> None:
        """One stream, with a stream of its own to each server."""
        channels = [grpc.aio.insecure_channel(each, options=_OPTIONS) for each in self._addresses]
        calls: list[Any] = [channel.stream_stream(METHOD)() for channel in channels]
        answers = asyncio.ensure_future(self._answer(calls, context))
        while (chunk := await context.read()) is not grpc.aio.EOF:
            for call in calls:
                await call.write(chunk)
        answers.cancel()
        for call, channel in zip(calls, channels, strict=True):
            call.cancel()
            await channel.close()

    async def _answer(self, calls: list[Any], context: Any) -> None:
        while True:
            for call in calls:
                answer = await call.read()
            await context.write(answer)


class EchoStream:
    """One persistent stream to an echo server, one request at a time."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._call: Any = self._channel.stream_stream(METHOD)()

    async def send(self, payload: bytes) -> int:
        """Sends it in chunks, and returns how many bytes came back."""
        view = memoryview(payload)
        chunks = [bytes(view[at : at + CHUNK_BYTES]) for at in range(0, len(view), CHUNK_BYTES)]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(chunks))
            received = group.create_task(self._read(len(chunks)))
        return received.result()

    async def _write(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            await self._call.write(chunk)

    async def _read(self, count: int) -> int:
        return sum([len(await self._call.read()) for _ in range(count)])

    async def close(self) -> None:
        """Closes the stream and its connection."""
        self._call.cancel()
        await self._channel.close()


async def _serve(behaviour: Callable[..., AsyncIterator[bytes] | Awaitable[None]]) -> None:
    keep_freed_memory()
    server = grpc.aio.server(options=_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(behaviour)
    service, method = METHOD.strip("/").split("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"LISTENING 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve(_Relay(sys.argv[1:]).serve if len(sys.argv) > 1 else _echo))
