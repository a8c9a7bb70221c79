"""How requests for one layer are merged, without a network."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt
import pytest
import torch

from expertmesh.codec.messages import ForwardRequest
from expertmesh.errors import OverloadedError, UnavailableError
from expertmesh.placement import SlotMap
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.tasks import TaskSet
from router_service.batch import Answer, LayerQueue, Member, split
from router_service.snapshot import Snapshot

SNAPSHOT = Snapshot(SlotMap(1, ()))
FAR = 30.0


class Shards:
    """Computes a batch when told to: 2 x hidden."""

    def __init__(self) -> None:
        self.batches: list[list[Member]] = []
        self.deadlines: list[Deadline] = []
        self.proceed = asyncio.Event()
        self.cancelled = 0
        self._another = asyncio.Event()

    async def compute(self, members: list[Member], deadline: Deadline) -> list[Answer]:
        self.batches.append(members)
        self.deadlines.append(deadline)
        self._another.set()
        try:
            await self.proceed.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        hidden = torch.cat([member.request.hidden_states for member in members])
        rows = len(hidden)
        whole = Answer(
            2 * hidden,
            np.zeros((rows, 1), np.int32),
            np.zeros((rows, 1), np.float32),
            SNAPSHOT,
            np.arange(rows),
        )
        return split(members, whole)

    async def have(self, batches: int) -> None:
        """Returns once so many have come, counted from the first."""
        while len(self.batches) < batches:
            self._another.clear()
            await self._another.wait()

    @property
    def sizes(self) -> list[int]:
        return [len(members) for members in self.batches]


def _request(value: float, rows: int = 1) -> ForwardRequest:
    return ForwardRequest(layer=0, hidden_states=torch.full((rows, 2), value))


def _ask(queue: LayerQueue, value: float, rows: int = 1) -> asyncio.Task[Answer]:
    return asyncio.ensure_future(queue.answer(_request(value, rows), Deadline.after(FAR)))


def _nothing(rows: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and weights that nobody looks at."""
    return np.zeros((rows, 1), np.int32), np.zeros((rows, 1), np.float32)


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_request_alone_waits_for_nobody_and_the_others_leave_together() -> None:
    async def scenario() -> tuple[list[int], list[Answer]]:
        shards = Shards()
        queue = LayerQueue(shards.compute, max_rows=100, max_batches=1, tasks=TaskSet())
        asks = [_ask(queue, float(i), rows=i + 1) for i in range(4)]
        await _settle()
        shards.proceed.set()
        return shards.sizes, list(await asyncio.gather(*asks))

    sizes, answers = asyncio.run(scenario())

    assert sizes[0] == 1
    for i, answer in enumerate(answers):
        assert answer.hidden_states.tolist() == [[2.0 * i] * 2] * (i + 1)
        assert answer.retried_T is not None
        assert len(answer.retried_T) == i + 1


def test_waiting_requests_are_merged_up_to_the_row_limit() -> None:
    async def scenario() -> list[int]:
        shards = Shards()
        queue = LayerQueue(shards.compute, max_rows=5, max_batches=1, tasks=TaskSet())
        asks = [_ask(queue, 0.0, rows) for rows in (1, 1, 2, 2, 1, 9)]
        await _settle()
        shards.proceed.set()
        await asyncio.gather(*asks)
        return shards.sizes

    assert asyncio.run(scenario()) == [1, 3, 1, 1]


def test_a_batch_has_the_deadline_of_its_latest_member() -> None:
    async def scenario() -> tuple[list[Deadline], list[Deadline]]:
        shards = Shards()
        queue = LayerQueue(shards.compute, max_rows=100, max_batches=1, tasks=TaskSet())
        alone, late = Deadline.after(FAR), Deadline.after(2 * FAR)
        first = asyncio.ensure_future(queue.answer(_request(0.0), alone))
        await _settle()
        second = asyncio.ensure_future(queue.answer(_request(1.0), Deadline.after(FAR)))
        third = asyncio.ensure_future(queue.answer(_request(2.0), late))
        await _settle()
        shards.proceed.set()
        await asyncio.gather(first, second, third)
        return [alone, late], shards.deadlines

    expected, deadlines = asyncio.run(scenario())

    assert [deadline.at for deadline in deadlines] == [deadline.at for deadline in expected]


def test_a_batch_goes_on_for_who_is_left_and_stops_when_nobody_is() -> None:
    async def scenario() -> tuple[int, int]:
        shards = Shards()
        queue = LayerQueue(shards.compute, max_rows=100, max_batches=1, tasks=TaskSet())
        first = _ask(queue, 0.0)
        await _settle()
        pair = [_ask(queue, 1.0), _ask(queue, 2.0)]
        first.cancel()
        await _settle()
        pair[0].cancel()
        await _settle()
        after_one = shards.cancelled
        pair[1].cancel()
        await _settle()
        return after_one, shards.cancelled

    assert asyncio.run(scenario()) == (1, 2)


def test_a_request_cancelled_while_it_waits_is_never_computed() -> None:
    async def scenario() -> list[int]:
        shards = Shards()
        queue = LayerQueue(shards.compute, max_rows=100, max_batches=1, tasks=TaskSet())
        asks = [_ask(queue, float(i)) for i in range(4)]
        await _settle()
        asks.pop(2).cancel()
        await _settle()
        shards.proceed.set()
        await asyncio.gather(*asks)
        return shards.sizes

    assert asyncio.run(scenario()) == [1, 2]  # who came before and after it leave together


def test_a_failed_batch_fails_each_member_and_the_queue_goes_on() -> None:
    async def scenario() -> tuple[list[object], Answer]:
        shards = Shards()
        calls = 0

        async def compute(members: list[Member], deadline: Deadline) -> list[Answer]:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise UnavailableError("gone")
            return await shards.compute(members, deadline)

        queue = LayerQueue(compute, max_rows=100, max_batches=1, tasks=TaskSet())
        asks = [_ask(queue, float(i)) for i in range(3)]
        await _settle()
        shards.proceed.set()
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        return list(outcomes[1:]), await _ask(queue, 5.0)

    failed, answered = asyncio.run(scenario())

    assert [type(error) for error in failed] == [UnavailableError, UnavailableError]
    assert failed[0] is not failed[1]
    assert answered.hidden_states.tolist() == [[10.0, 10.0]]


def test_a_failed_batch_tells_each_member_all_that_the_error_said() -> None:
    failure = OverloadedError("full", field="hidden_states", retry_after_s=0.5)

    async def scenario() -> list[object]:
        going = asyncio.Event()

        async def compute(members: list[Member], _: Deadline) -> list[Answer]:
            await going.wait()
            raise failure

        queue = LayerQueue(compute, max_rows=100, max_batches=1, tasks=TaskSet())
        asks = [_ask(queue, float(i)) for i in range(3)]
        await _settle()
        going.set()
        return list(await asyncio.gather(*asks, return_exceptions=True))

    _, *merged = asyncio.run(scenario())

    assert [type(error) for error in merged] == [OverloadedError, OverloadedError]
    assert [vars(error) for error in merged] == [vars(failure)] * 2


def test_a_bug_in_a_batch_reaches_every_member_that_still_waits() -> None:
    bug = ZeroDivisionError("a bug")

    async def scenario() -> list[object]:
        going = asyncio.Event()

        async def compute(members: list[Member], _: Deadline) -> list[Answer]:
            await going.wait()
            raise bug

        queue = LayerQueue(compute, max_rows=100, max_batches=1, tasks=TaskSet())
        first = _ask(queue, 0.0)
        await _settle()
        merged = [_ask(queue, float(i)) for i in range(3)]
        await _settle()
        first.cancel()  # the others leave together
        await _settle()
        merged[1].cancel()
        await _settle()
        going.set()
        return list(await asyncio.gather(*merged, return_exceptions=True))

    told = asyncio.run(scenario())

    assert [told[0], told[2]] == [bug, bug]
    assert isinstance(told[1], asyncio.CancelledError)


def test_each_member_gets_its_own_rows_of_all_that_a_batch_answers() -> None:
    members = [Member(_request(0.0, rows), Deadline.after(FAR)) for rows in (1, 2)]
    rows = np.arange(3, dtype=np.int32)[:, None]
    whole = Answer(
        torch.tensor([[0.0], [1.0], [2.0]]),
        10 + rows,
        (rows / 2).astype(np.float32),
        SNAPSHOT,
        np.array([7, 8, 9]),
    )

    first, second = split(members, whole)

    assert first.hidden_states.tolist() == [[0.0]]
    assert second.hidden_states.tolist() == [[1.0], [2.0]]
    assert [first.expert_ids.tolist(), second.expert_ids.tolist()] == [[[10]], [[11], [12]]]
    assert [first.expert_weights.tolist(), second.expert_weights.tolist()] == [
        [[0.0]],
        [[0.5], [1.0]],
    ]
    assert first.snapshot is second.snapshot is SNAPSHOT
    assert first.retried_T is not None
    assert second.retried_T is not None
    assert [first.retried_T.tolist(), second.retried_T.tolist()] == [[7], [8, 9]]
    assert split(members[1:], second) == [second]


@pytest.mark.parametrize("max_batches", [1, 3])
def test_no_more_batches_run_at_once_than_allowed(max_batches: int) -> None:
    async def scenario() -> int:
        shards = Shards()
        queue = LayerQueue(shards.compute, max_rows=1, max_batches=max_batches, tasks=TaskSet())
        asks = [_ask(queue, float(i)) for i in range(6)]
        await _settle()
        running = len(shards.batches)
        shards.proceed.set()
        await asyncio.gather(*asks)
        return running

    assert asyncio.run(scenario()) == max_batches


def test_a_second_batch_starts_beside_one_that_takes_unusually_long() -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        shards = Shards()
        queue = LayerQueue(
            shards.compute, max_rows=100, max_batches=2, tasks=TaskSet(), overlap_after=3.0
        )
        shards.proceed.set()
        await _ask(queue, 0.0)  # what is usual: hardly any time
        shards.proceed.clear()
        asks = [_ask(queue, float(i)) for i in range(4)]
        await shards.have(3)
        late = shards.sizes[1:]
        asks += [_ask(queue, float(i)) for i in range(4, 6)]
        await _settle()  # two are under way
        shards.proceed.set()
        await asyncio.gather(*asks)
        return late, shards.sizes[1:]

    late, sizes = asyncio.run(scenario())

    # How many joined the second depends on the clock; that it started beside the first does not.
    assert len(late) == 2
    assert len(sizes) == 3
    assert sum(sizes) == 6


def test_a_third_batch_starts_beside_the_second_as_that_did_beside_the_first() -> None:
    async def scenario() -> list[int]:
        shards = Shards()
        queue = LayerQueue(
            shards.compute, max_rows=100, max_batches=3, tasks=TaskSet(), overlap_after=1.0
        )
        asyncio.get_running_loop().call_later(0.05, shards.proceed.set)
        await _ask(queue, 0.0)  # what is usual
        shards.proceed.clear()
        asks, running = [], []
        for batch in range(2, 5):
            asks.append(_ask(queue, float(batch)))
            await shards.have(batch)
            running.append(queue.running)
        shards.proceed.set()
        await asyncio.gather(*asks)
        return [*running, queue.running]

    assert asyncio.run(scenario()) == [1, 2, 3, 0]


def test_an_answer_counts_the_pairs_of_all_its_rows_that_were_sent_again() -> None:
    answer = Answer(torch.zeros(2, 1), *_nothing(2), SNAPSHOT, np.array([1, 2]))

    assert answer.retried_pairs == 3
    assert Answer(torch.zeros(2, 1), *_nothing(2), SNAPSHOT, None).retried_pairs == 0


def test_batches_that_end_in_their_usual_time_come_one_after_the_other() -> None:
    async def scenario() -> tuple[list[int], int]:
        most = running = 0
        sizes: list[int] = []

        async def compute(members: list[Member], _: Deadline) -> list[Answer]:
            nonlocal most, running
            running += 1
            most = max(most, running)
            sizes.append(len(members))
            await asyncio.sleep(0.02)
            running -= 1
            rows = sum(member.rows for member in members)
            return split(members, Answer(torch.zeros(rows, 2), *_nothing(rows), SNAPSHOT, None))

        queue = LayerQueue(
            compute, max_rows=100, max_batches=2, tasks=TaskSet(), overlap_after=100.0
        )
        await _ask(queue, 0.0)
        await asyncio.gather(*(_ask(queue, float(i)) for i in range(10)))
        return sizes, most

    assert asyncio.run(scenario()) == ([1, 1, 9], 1)


def test_a_batch_that_nobody_waits_for_any_more_leaves_its_place() -> None:
    async def scenario() -> list[int]:
        shards = Shards()
        queue = LayerQueue(shards.compute, max_rows=100, max_batches=1, tasks=TaskSet())
        first, second = _ask(queue, 0.0), _ask(queue, 1.0)
        await _settle()
        first.cancel()
        await shards.have(2)
        second.cancel()
        await _settle()
        shards.proceed.set()
        await _ask(queue, 2.0)
        return [queue.running, queue.waiting]

    assert asyncio.run(scenario()) == [0, 0]
