"""When batches of one layer start beside each other: to the second, on a clock that is ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from expertmesh.codec.messages import ForwardRequest
from expertmesh.placement import SlotMap
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.tasks import TaskSet
from router_service.batch import Answer, LayerQueue, Member, split
from router_service.snapshot import Snapshot
from tests.virtual_time import VirtualLoop, run_in_virtual_time


class Shards:
    """Takes as long for each batch as was said, and notes when each began."""

    def __init__(self, *takes_s: float) -> None:
        self.began: list[tuple[float, int]] = []  # when, and how many requests
        self.tasks: list[asyncio.Task[None] | None] = []
        self._takes_s: Iterator[float] = iter(takes_s)

    async def compute(self, members: list[Member], _: Deadline) -> list[Answer]:
        self.began.append((_now(), len(members)))
        self.tasks.append(asyncio.current_task())
        await asyncio.sleep(next(self._takes_s))
        rows = sum(member.rows for member in members)
        ids, weights = np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.float32)
        whole = Answer(torch.zeros(rows, 2), ids, weights, Snapshot(SlotMap(1, ())), None)
        return split(members, whole)

    def queue(self, max_batches: int, overlap_after: float) -> LayerQueue:
        return LayerQueue(self.compute, 100, max_batches, TaskSet(), overlap_after)


def _now() -> float:
    return round(asyncio.get_running_loop().time(), 6)


async def _ask(queue: LayerQueue) -> Answer:
    request = ForwardRequest(layer=0, hidden_states=torch.zeros(1, 2))
    return await queue.answer(request, Deadline.after(30.0))


async def _at(when: float, queue: LayerQueue) -> Answer:
    await asyncio.sleep(when - asyncio.get_running_loop().time())
    return await _ask(queue)


@pytest.mark.parametrize(
    ("took_s", "usual_s"),
    [
        ([2.0], 2.0),
        ([2.0, 3.0], 2.2),  # a fifth of the way to what the newest took
        ([2.0, 1.0], 1.8),
        ([2.0, 100.0], 2.4),  # which counts as twice the usual time at most
        ([2.0, 3.0, 1.2], 2.0),
        ([0.1], 0.1),
    ],
    ids=str,
)
def test_a_batch_starts_beside_one_that_has_taken_three_times_what_is_usual(
    took_s: list[float], usual_s: float
) -> None:
    async def scenario() -> list[tuple[float, int]]:
        shards = Shards(*took_s, 1000.0, 1.0)
        queue = shards.queue(max_batches=2, overlap_after=3.0)
        for _ in took_s:
            await _ask(queue)
        await asyncio.gather(*(_ask(queue) for _ in range(3)))
        return shards.began[len(took_s) :]

    start = sum(took_s)
    assert run_in_virtual_time(scenario()) == [
        (pytest.approx(start), 1),
        (pytest.approx(start + 3 * usual_s), 2),
    ]


def test_each_further_batch_waits_for_the_newest_and_no_more_run_than_allowed() -> None:
    """Usual is 0.2 at first, so that the second of two starts 0.6 after the other. The third waits
    for one of them to end, at 0.9, which makes 0.24 usual: three times that after 0.8, then."""

    async def scenario() -> list[tuple[float, int]]:
        shards = Shards(0.2, 0.7, 5.0, 1.0)
        queue = shards.queue(max_batches=2, overlap_after=3.0)
        await asyncio.gather(*(_at(when, queue) for when in (0.0, 0.2, 0.3, 0.85)))
        return shards.began

    assert run_in_virtual_time(scenario()) == [(0.0, 1), (0.2, 1), (0.8, 1), (1.52, 1)]


def test_a_queue_that_has_started_one_beside_another_looks_again_for_the_next() -> None:
    async def scenario() -> list[tuple[float, int]]:
        shards = Shards(0.2, 9.0, 9.0, 9.0)
        queue = shards.queue(max_batches=3, overlap_after=3.0)
        await asyncio.gather(*(_at(when, queue) for when in (0.0, 0.2, 0.3, 0.9)))
        return shards.began

    assert run_in_virtual_time(scenario()) == [(0.0, 1), (0.2, 1), (0.8, 1), (1.4, 1)]


def test_batches_start_beside_each_other_at_once_where_nothing_else_is_said() -> None:
    async def scenario() -> list[tuple[float, int]]:
        shards = Shards(1.0, 5.0, 5.0)
        queue = LayerQueue(shards.compute, 100, 2, TaskSet())
        await _ask(queue)
        await asyncio.gather(_ask(queue), _ask(queue))
        return shards.began

    assert run_in_virtual_time(scenario()) == [(0.0, 1), (1.0, 1), (1.0, 1)]


def test_who_comes_when_a_batch_is_due_leaves_with_those_that_waited_for_it() -> None:
    async def scenario() -> list[tuple[float, int]]:
        shards = Shards(1.0, 50.0, 1.0)
        queue = shards.queue(max_batches=2, overlap_after=3.0)
        await _ask(queue)
        asks = [asyncio.ensure_future(_ask(queue)) for _ in range(2)]
        await asyncio.sleep(1.0)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.now += 2.5  # something else kept the loop busy: the timer has not come yet
        await _ask(queue)
        await asyncio.gather(*asks)
        return shards.began

    assert run_in_virtual_time(scenario()) == [(0.0, 1), (1.0, 1), (4.5, 2)]


def test_a_request_alone_is_computed_in_its_own_task_and_a_batch_in_one_named_so() -> None:
    async def scenario() -> list[bool]:
        shards = Shards(1.0, 1.0)
        queue = shards.queue(max_batches=1, overlap_after=0.0)
        asks = [asyncio.ensure_future(_ask(queue)) for _ in range(3)]
        await asyncio.gather(*asks)
        alone, merged = shards.tasks
        assert merged is not None
        return [alone is asks[0], merged in asks, merged.get_name() == "batch"]

    assert run_in_virtual_time(scenario()) == [True, False, True]
