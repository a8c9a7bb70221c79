"""Processes that are forked beside a busy stream, as Ray starts its own, become their programs."""

from __future__ import annotations

import os
import subprocess
import sys

_FORKS = 60
_SCRIPT = f"""
import expertmesh.rpc.engine  # before grpc, as everything of ours does

import os, subprocess
import grpc, grpc.aio
from expertmesh.rpc import loop

async def echo(messages, _):
    async for message in messages:
        yield message

async def serve():
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("e", {{"E": handler}}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.aio.insecure_channel(f"127.0.0.1:{{port}}").stream_stream("/e/E")()

async def talk(call, busy):
    while True:
        await call.write(b"x")
        await call.read()
        busy.set()

import threading
server, call = loop.run(serve())
busy = threading.Event()
talking = loop.submit(talk(call, busy))
for _ in range({_FORKS}):
    busy.clear()
    assert busy.wait(30.0), "the stream goes on"
    started = subprocess.Popen(["true"], preexec_fn=lambda: None)
    print(started.wait(30.0))
assert "GRPC_ENABLE_FORK_SUPPORT" not in os.environ, "later processes decide for themselves"
os._exit(0)
"""


def test_forked_processes_start_beside_a_busy_stream() -> None:
    environment = {name: value for name, value in os.environ.items() if "GRPC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        capture_output=True,
        text=True,
        timeout=120.0,
        env=environment,
        check=True,
    )

    assert done.stdout.split() == ["0"] * _FORKS
    # gRPC says so at nearly every fork when its handlers are there, though few children die of it.
    assert "fork() handlers" not in done.stderr
