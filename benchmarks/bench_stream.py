"""One hop of our framing and codec, tensor to tensor, beside Arrow Flight's DoExchange.

python benchmarks/bench_stream.py --peer-python FOLDER/bin/python    # one that has pyarrow
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import uvloop
from harness import Report, Spread, WrongOutputError, ratios
from machine import facts
from services import service
from stream_echo import SERVICE

from expertmesh.codec.messages import EXECUTE_REQUEST, EXECUTE_RESPONSE, ExecuteRequest
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.heap import keep_freed_memory
from expertmesh.rpc.stream import FrameStream

_CASES = {1 << 20: 100, 16 << 20: 12}  # requests in a block, by bytes
_WIDTH = 2048
_SAYS = """\
A server in a process of its own sends back what it is sent; one request at a time on one stream
over loopback. GB/s counts the bytes of both ways: median (least–largest) of the blocks' medians.
`ours` is `FrameStream` to `FrameSession` and back, from bf16 tensor to bf16 tensor, in Python's
asyncio. `flight` is `DoExchange` of pyarrow (C++, threads), one record batch of uint8 each way.
`ratio` is GB/s of ours over Flight's, block by block. One core for each end; every byte is
compared."""


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


async def _ours(stream: FrameStream, report: Report, size: int, count: int) -> list[float]:
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randn(size // 2 // _WIDTH, _WIDTH, generator=generator).bfloat16()
    request = ExecuteRequest(
        layer=0,
        hidden_states=hidden,
        expert_ids=torch.zeros(len(hidden), 1, dtype=torch.int32),
        expert_weights=torch.ones(len(hidden), 1),
    )
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        answer = await stream.call(request, Deadline.after(60.0))
        seconds.append(time.perf_counter() - start)
    report.gate(_case(size), answer.hidden_states, hidden, 1e-9)
    return seconds


def _case(size: int) -> str:
    return f"{size >> 20} MiB"


async def _measure(
    report: Report, address: str, flight: Callable[[int, int], list[float]] | None, blocks: int
) -> None:
    keep_freed_memory()  # as every client of ours does
    channel = open_channel(address)
    stream = FrameStream(channel, f"/{SERVICE}/Stream", EXECUTE_REQUEST, EXECUTE_RESPONSE, "echo")
    for size, count in _CASES.items():
        speeds: dict[str, list[float]] = {"ours": [], "flight": []}
        for block in range(-1, blocks):  # the first one warms up
            ours = await _ours(stream, report, size, count)
            peer = flight(size, count) if flight is not None else []
            if block >= 0:
                for name, seconds in (("ours", ours), ("flight", peer)):
                    if seconds:
                        speeds[name].append(2 * size / 1e9 / sorted(seconds)[len(seconds) // 2])
        peered = bool(speeds["flight"])
        report.add(
            _case(size),
            **{"ours GB/s": Spread.of(speeds["ours"])},
            **{"flight GB/s": Spread.of(speeds["flight"]) if peered else "not installed"},
            ratio=ratios(speeds["ours"], speeds["flight"]) if peered else "",
        )
    await stream.close()
    await channel.close()


def main() -> None:
    """Starts both servers, measures in turn, ends them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", help="an interpreter with pyarrow")
    parser.add_argument("--blocks", type=int, default=9, help="of each side, in turn")
    parser.add_argument("--hardware", help="writes benchmarks/results, e.g. 2core-epyc")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    python = flight_python(arguments.peer_python)
    version = "not installed"
    if python:
        says = [python, "-c", "import pyarrow; print(pyarrow.__version__)"]
        version = subprocess.run(says, capture_output=True, text=True, check=True).stdout.strip()
    report = Report(
        theme="stream",
        title="One hop of a stream, tensor to tensor, and Arrow Flight",
        command=f"python benchmarks/bench_stream.py --peer-python ... --blocks {arguments.blocks}",
        says=_SAYS,
        facts=facts() | {"pyarrow": version},
    )
    here = Path(__file__).parent
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        start = stack.enter_context
        address = start(service(Path(name), str(here / "stream_echo.py")))
        run = None
        if python:
            script = str(here / "flight_echo.py")
            peer = Flight(python, script, start(service(Path(name), script, python=python)))
            stack.callback(peer.close)
            run = peer.run
        uvloop.run(_measure(report, address, run, arguments.blocks))
    print(report.markdown())
    if arguments.hardware:
        report.write(arguments.hardware)


if __name__ == "__main__":
    main()
