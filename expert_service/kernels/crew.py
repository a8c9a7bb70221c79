"""Threads that compute whole experts beside each other, not all of them one expert at a time.

For a few rows an expert is limited by the reading of its weights. Two threads that share each
product meet three times an expert, and wait for each other; with an expert for each, they meet once
a batch (2 threads, 6 experts of 2048 x 1408 in bf16, 4 rows each: 0.85 of the read bandwidth
instead of 0.57).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

_T = TypeVar("_T")


class Span(Protocol):
    """Some places of one expert."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


_S = TypeVar("_S", bound=Span)
#: What reading an expert's weights takes, in rows of arithmetic: so parts take about equally long.
_READ_ROWS = 32
#: By how much longer shared products take: a little where arithmetic is the limit, and much where
#: reading is (measured with 2 threads, rows an expert: 384 1.0, 48 1.2, 4 1.3 to 1.5).
_MEET_COMPUTE, _MEET_READ = 0.05, 0.35


class Crew:
    """As many threads as a backend may use. They start with the first work."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="experts")

    def run(self, jobs: Sequence[Callable[[], _T]]) -> list[_T]:
        """What the jobs return, all of them at the same time; the threads are divided among them.

        At most as many jobs as there are threads. Raises what a job raises, once all have ended.
        """
        each = self._threads // len(jobs)
        futures = [self._pool.submit(_with_threads, each, job) for job in jobs]
        failures = [failure for future in futures if (failure := future.exception()) is not None]
        if failures:
            raise failures[0]
        return [future.result() for future in futures]


def _with_threads(threads: int, job: Callable[[], _T]) -> _T:
    # Settings of the thread itself, both of them.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        return job()


def divide(spans: Sequence[_S], threads: int) -> Sequence[Sequence[_S]]:
    """`spans`, in their order, in runs to be computed at the same time; one run where threads that
    share each product are through sooner, because the runs would take too unequally long."""
    parts = min(threads, len(spans))
    costs = [_READ_ROWS + span.stop - span.start for span in spans]
    total = sum(costs)
    runs: list[list[_S]] = [[] for _ in range(parts)]
    taken = [0] * parts
    before = 0
    for span, cost in zip(spans, costs, strict=True):
        part = int(parts * (before + cost / 2) / total)
        runs[part].append(span)
        taken[part] += cost
        before += cost
    read_share = _READ_ROWS * len(spans) / total
    if max(taken) * parts > total * (1.0 + _MEET_COMPUTE + _MEET_READ * read_share):
        return [spans]
    return runs
