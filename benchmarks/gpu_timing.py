"""Times calls on a GPU: with events, as eager launches and as replays of a CUDA graph.

A side is a list of calls, one for each set of inputs: they are run one after the other, so that
each finds another's data in the cache, and its weights in memory. Times are per call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Calls = Sequence[Callable[[], torch.Tensor]]


class Sides:
    """Sides that take turns, round by round, so that all meet the same noise."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._runs: dict[str, tuple[Callable[[], None], int]] = {}
        self.notes: dict[str, str] = {}  # why a side has no time

    def add_eager(self, name: str, calls: Calls) -> None:
        """Launches from Python."""

        def run() -> None:
            for call in calls:
                call()

        self._runs[name] = (run, len(calls))

    def add_graph(self, name: str, calls: Calls) -> None:
        """One graph of all calls; a side that cannot be captured gets a note instead."""
        try:
            graph = _capture(calls)
        except Exception as error:  # anything a peer does while it is captured
            self.notes[name] = f"not captured: {type(error).__name__}"
            torch.cuda.synchronize()
            return
        self._runs[name] = (graph.replay, len(calls))

    def medians_us(self) -> dict[str, float]:
        """Microseconds of one call of each side."""
        samples: dict[str, list[float]] = {name: [] for name in self._runs}
        for index in range(-1, self._rounds):
            for name, (run, calls) in self._runs.items():
                us = _event_us(run) / calls
                if index >= 0:
                    samples[name].append(us)
        return {name: statistics.median(values) for name, values in samples.items()}


def copy_bytes_per_s() -> float:
    """Of a large copy on the GPU, bytes read and bytes written."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    us = _median_us(lambda: target.copy_(source))
    return 2 * source.nbytes / us * 1e6


def bf16_flops_per_s() -> float:
    """Of a large bf16 matrix product on random data."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    us = _median_us(lambda: a @ b)
    return 2 * size**3 / us * 1e6


def _median_us(run: Callable[[], object]) -> float:
    return statistics.median([_event_us(run) for _ in range(12)][2:])  # two to warm up


def _event_us(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _capture(calls: Calls) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and fills the caches of whoever keeps some
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def fastest(times_us: Mapping[str, float], side: str) -> float:
    """The lesser of a side's times, "SIDE eager" and "SIDE graph", of which it has one at least."""
    names = (f"{side} eager", f"{side} graph")
    return min(times_us[name] for name in names if name in times_us)
