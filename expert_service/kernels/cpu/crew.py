"""Threads that compute whole experts beside each other, not all of them one expert at a time.

For a few rows an expert is limited by the reading of its weights. Two threads that share each
product meet three times an expert, and wait for each other; with an expert for each, they meet once
a batch (2 threads, 6 experts of 2048 x 1408 in bf16, 4 rows each: 0.85 of the read bandwidth
instead of 0.57).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
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
Job = Callable[[], None]
#: What reading an expert's weights takes, in rows of arithmetic: so parts take about equally long.
_READ_ROWS = 32
#: By how much longer shared products take: a little where arithmetic is the limit, and much where
#: reading is (measured with 2 threads, rows an expert: 384 1.0, 48 1.2, 4 1.3 to 1.5).
_MEET_COMPUTE, _MEET_READ = 0.05, 0.35


class Crew:
    """As many threads as a backend may use. They start with the first work, and wait for more.

    Each call is of one thread at a time. Queues and not futures: these are in C, and take a tenth
    of a millisecond less where the caches are full of weights.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._started = 0

    def run(self, jobs: Sequence[Callable[[], _T]]) -> list[_T]:
        """What the jobs return, all of them at the same time; torch's threads are divided among
        them.

        At most as many jobs as there are threads. Raises what a job raises, once all have ended.
        """
        each = self.threads // len(jobs)
        results: list[_T | None] = [None] * len(jobs)

        def job_at(at: int) -> None:
            results[at] = _with_threads(each, jobs[at])

        self._submit([partial(job_at, at) for at in range(len(jobs))])
        self._join(len(jobs))
        return results  # type: ignore[return-value] # every job has ended without a failure

    def share(self, tasks: Sequence[Job]) -> None:
        """Every task, by whoever is free next: the calling thread, too. They do not use torch's
        threads. Raises what a task raises, once all threads have ended.
        """
        left = iter(tasks)

        def take() -> None:
            for task in left:
                task()

        others = min(self.threads, len(tasks)) - 1
        self._submit([take] * others)
        try:
            take()
        finally:
            self._join(others)

    def _submit(self, jobs: Sequence[Job]) -> None:
        while self._started < len(jobs):
            arguments = self._inbox, self._done
            Thread(target=_work, args=arguments, name="experts", daemon=True).start()
            self._started += 1
            weakref.finalize(self, self._inbox.put, None)  # one thread ends
        for job in jobs:
            self._inbox.put(job)

    def _join(self, jobs: int) -> None:
        failures = [failure for _ in range(jobs) if (failure := self._done.get()) is not None]
        if failures:
            raise failures[0]


def _work(inbox: SimpleQueue[Job | None], done: SimpleQueue[BaseException | None]) -> None:
    """Does jobs until there is None; gives None for each, or what it raised."""
    while (job := inbox.get()) is not None:
        try:
            job()
        except BaseException as failure:
            done.put(failure)
        else:
            done.put(None)
        del job  # it may hold a batch's tensors


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
