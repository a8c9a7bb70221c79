"""One hop of our framing and codec, tensor to tensor, beside Arrow Flight and bare gRPC.

python benchmarks/bench_stream.py --peer-python FOLDER/bin/python    # one that has pyarrow
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import uvloop
from echo import EchoStream
from harness import Report, Spread, WrongOutputError, output_options, quantile, ratios
from machine import facts
from services import service
from stream_echo import SERVICE, echo_request

from expertmesh.codec.messages import EXECUTE_REQUEST, EXECUTE_RESPONSE
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.data_port import host_of
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.heap import keep_freed_memory
from expertmesh.rpc.stream import FrameStream

_CASES = {1 << 20: 100, 16 << 20: 12}  # requests in a block, by bytes
_SAYS = """\
A server in a process of its own sends back what it is sent; one request at a time on one stream
over loopback. GB/s counts the bytes of both ways: median (least–largest) of the blocks' medians.
`ours` is `FrameStream` to `FrameSession` and back, from bf16 tensor to bf16 tensor, in Python's
asyncio, over a data connection; `over gRPC` is the same without one. `flight` is `DoExchange` of
pyarrow (C++, threads), one record batch of uint8 each way. `bare` is what gRPC in Python takes at
the least: the same bytes on a `grpc.aio` stream, in chunks of 1 MiB that are sent back one by one,
in processes set up as ours are, without a tensor or a frame. `ratio` is GB/s of ours over Flight's,
block by block; `gRPC ratio` and `bare ratio` are those of the other two. Client and server share
two cores, unpinned; every byte of ours and Flight's is compared."""


def flight_python(wanted: str | None) -> str | None:
    """An interpreter that has pyarrow: the one given, else this one; None when there is none."""
    python = wanted or sys.executable
    check = subprocess.run(
        [python, "-c", "import pyarrow.flight"], capture_output=True, check=False
    )
    return python if check.returncode == 0 else None


class Flight:
    """Flight's client, in a process of its own."""

    def __init__(self, python: str, script: str, address: str) -> None:
        self._process = subprocess.Popen(
            [python, script, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, size: int, count: int) -> list[float]:
        """Seconds of each of `count` echoes. Raises WrongOutputError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(size, count, file=self._process.stdin, flush=True)
        result = json.loads(self._process.stdout.readline())
        if not result["right"]:
            raise WrongOutputError("Flight gave back other bytes")
        return list(result["seconds"])

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


_Run = Callable[[int, int], Awaitable[list[float]]]  # (bytes, requests) to seconds of each


async def _bare(echo: EchoStream, size: int, count: int) -> list[float]:
    payload = bytes(size)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        received = await echo.send(payload)
        seconds.append(time.perf_counter() - start)
        if received != size:
            raise WrongOutputError("the bare stream lost bytes")
    return seconds


async def _ours(stream: FrameStream, report: Report, size: int, count: int) -> list[float]:
    request = echo_request(size)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        answer = await stream.call(request, Deadline.after(60.0))
        seconds.append(time.perf_counter() - start)
    report.gate(_case(size), answer.hidden_states, request.hidden_states, 1e-9)
    return seconds


def _case(size: int) -> str:
    return f"{size >> 20} MiB"


async def _measure(
    report: Report,
    address: str,
    bare_address: str,
    flight: Callable[[int, int], list[float]] | None,
    blocks: int,
) -> None:
    keep_freed_memory()  # as every client of ours does
    channel = open_channel(address)
    codecs = EXECUTE_REQUEST, EXECUTE_RESPONSE
    method = f"/{SERVICE}/Stream"
    stream = FrameStream(channel, method, *codecs, "echo", data_host=host_of(address))
    plain = FrameStream(channel, method, *codecs, "echo")
    echo = EchoStream(bare_address)
    await stream.settled()
    if not stream.has_connection:
        raise WrongOutputError("no data connection")
    runs: dict[str, _Run] = {
        "ours": lambda size, count: _ours(stream, report, size, count),
        "over gRPC": lambda size, count: _ours(plain, report, size, count),
        "bare": lambda size, count: _bare(echo, size, count),
    }
    if flight is not None:
        runs["flight"] = lambda size, count: asyncio.to_thread(flight, size, count)
    for size, count in _CASES.items():
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for block in range(-1, blocks):  # the first one warms up
            for name, run in runs.items():
                seconds = await run(size, count)
                if block >= 0:
                    speeds[name].append(2 * size / 1e9 / quantile(seconds, 0.5))
        _add(report, _case(size), speeds)
    await echo.close()
    await stream.close()
    await plain.close()
    await channel.close()


def _add(report: Report, case: str, speeds: dict[str, list[float]]) -> None:
    columns: dict[str, object] = {
        f"{name} GB/s": Spread.of(speeds[name]) if name in speeds else "not installed"
        for name in ("ours", "over gRPC", "flight", "bare")
    }
    for name, column in (
        ("ours", "ratio"),
        ("over gRPC", "gRPC ratio"),
        ("bare", "bare ratio"),
    ):
        peered = "flight" in speeds
        columns[column] = ratios(speeds[name], speeds["flight"]) if peered else ""
    report.add(case, **columns)


def main() -> None:
    """Starts the servers, measures in turn, ends them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", help="an interpreter with pyarrow")
    parser.add_argument("--blocks", type=int, default=9, help="of each side, in turn")
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    python = flight_python(arguments.peer_python)
    version = "not installed"
    if python:
        says = [python, "-c", "import pyarrow; print(pyarrow.__version__)"]
        version = subprocess.run(says, capture_output=True, text=True, check=True).stdout.strip()
    report = Report(
        theme="stream",
        title="One hop of a stream, tensor to tensor, Arrow Flight, and bare gRPC",
        command=f"python benchmarks/bench_stream.py --peer-python ... --blocks {arguments.blocks}",
        says=_SAYS,
        facts=facts() | {"pyarrow": version},
    )
    here = Path(__file__).parent
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        start = stack.enter_context
        address = start(service(Path(name), str(here / "stream_echo.py")))
        bare_address = start(service(Path(name), str(here / "echo.py")))
        run = None
        if python:
            script = str(here / "flight_echo.py")
            peer = Flight(python, script, start(service(Path(name), script, python=python)))
            stack.callback(peer.close)
            run = peer.run
        uvloop.run(_measure(report, address, bare_address, run, arguments.blocks))
    report.publish(arguments)


if __name__ == "__main__":
    main()
