"""From which size on shared memory pays: one hop of a stream, with it and without.

python benchmarks/bench_shared.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import torch
import uvloop
from harness import Report, Spread, WrongOutputError, output_options, quantile, ratios
from machine import facts
from services import service
from stream_echo import SERVICE, echo_request

from expertmesh.codec.messages import EXECUTE_REQUEST, EXECUTE_RESPONSE
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.data_port import host_of
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.heap import keep_freed_memory
from expertmesh.rpc.lending import Lender
from expertmesh.rpc.stream import FrameStream

_KIB = (4, 8, 16, 32, 64, 128, 256, 512, 1024)  # of hidden states, each way
_REQUESTS = 60  # in a block
_ARENA_BYTES = 64 << 20
_SAYS = f"""\
A server in a process of its own sends back what it is sent; one request at a time, all messages on
data connections. `tcp` is a stream whose payloads travel in messages, `copied` one that shares
memory as a client does (an answer is copied out), `viewed` as a router does (an answer is used
where it lies); here both lend memory for any size, otherwise only from
`expertmesh.rpc.lending.LEAST_BYTES` on. Medians of {_REQUESTS} requests in us, then their median
(least–largest) over blocks; ratios are of `tcp` over the other, block by block: above 1 shared
memory is faster."""


async def _block(stream: FrameStream, report: Report, kib: int) -> float:
    """The median of one block, in microseconds. Gated."""
    request = echo_request(kib << 10)
    seconds = []
    for _ in range(_REQUESTS):
        start = time.perf_counter()
        answer = await stream.call(request, Deadline.after(60.0))
        seconds.append(time.perf_counter() - start)
    report.gate(f"{kib} KiB", answer.hidden_states, request.hidden_states, 1e-9)
    return round(1e6 * quantile(seconds, 0.5))


async def _measure(report: Report, address: str, blocks: int) -> None:
    keep_freed_memory()  # as every client of ours does
    lenders = {
        "tcp": None,
        "copied": Lender(_ARENA_BYTES, views=False, least_bytes=1),
        "viewed": Lender(_ARENA_BYTES, views=True, least_bytes=1),
    }
    async with AsyncExitStack() as stack:
        streams = {}
        for name, lender in lenders.items():
            channel = await stack.enter_async_context(open_channel(address))
            streams[name] = FrameStream(
                channel,
                f"/{SERVICE}/Stream",
                EXECUTE_REQUEST,
                EXECUTE_RESPONSE,
                "echo",
                lender,
                host_of(address),
            )
            stack.push_async_callback(streams[name].close)
            await streams[name].settled()
            if not streams[name].has_connection:
                raise WrongOutputError(f"{name}: no data connection")
            await streams[name].call(echo_request(4096), Deadline.after(60.0))
            if streams[name].transport != ("shm" if lender else "tcp"):
                raise WrongOutputError(f"{name}: payloads travel by {streams[name].transport}")
        for kib in _KIB:
            medians: dict[str, list[float]] = {name: [] for name in streams}
            for block in range(-1, blocks):  # the first one warms up
                for name, stream in streams.items():
                    median = await _block(stream, report, kib)
                    if block >= 0:
                        medians[name].append(median)
            report.add(
                f"{kib} KiB",
                **{f"{name} us": Spread.of(values) for name, values in medians.items()},
                **{
                    f"{name} ratio": ratios(medians["tcp"], medians[name])
                    for name in ("copied", "viewed")
                },
            )


def main() -> None:
    """Starts the server, measures in turn, ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=15, help="of each stream, in turn")
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        theme="shared",
        title="One hop of a stream, with shared memory and without",
        command=f"python benchmarks/bench_shared.py --blocks {arguments.blocks}",
        says=_SAYS,
        facts=facts(),
    )
    script = str(Path(__file__).parent / "stream_echo.py")
    with tempfile.TemporaryDirectory() as name, service(Path(name), script) as address:
        uvloop.run(_measure(report, address, arguments.blocks))
    report.publish(arguments)


if __name__ == "__main__":
    main()
