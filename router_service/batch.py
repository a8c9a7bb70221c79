"""Requests that wait for the same layer at the same time, merged into one batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.codec.messages import ForwardRequest
from expertmesh.errors import MeshError
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.tasks import TaskSet
from router_service.snapshot import Snapshot


@dataclass(slots=True)
class Answer:
    """One member's share of a batch's result."""

    hidden_states: torch.Tensor  # [T, H]
    expert_ids: npt.NDArray[np.int32]  # [T, k] routed experts, -1 for none
    expert_weights: npt.NDArray[np.float32]  # [T, k]
    snapshot: Snapshot
    #: By row: pairs that had to be sent again; None where none had.
    retried_T: npt.NDArray[np.int64] | None

    @property
    def retried_pairs(self) -> int:
        """(row, expert) pairs that had to be sent again."""
        return 0 if self.retried_T is None else int(self.retried_T.sum())


@dataclass(slots=True, eq=False)
class Member:
    """One request in a batch. It expires and is cancelled alone."""

    request: ForwardRequest
    deadline: Deadline

    @property
    def rows(self) -> int:
        """Rows of this request."""
        return len(self.request.hidden_states)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A member that others may join, and who waits for its answer."""

    member: Member
    future: asyncio.Future[Answer]


Compute = Callable[[list[Member], Deadline], Awaitable[list[Answer]]]


class LayerQueue:
    """Merges what waits for one layer in one dtype.

    A request that finds fewer than `max_batches` batches under way starts at once; the others wait
    and leave together, up to `max_rows`, when a batch ends. So company costs nobody any time.
    """

    def __init__(self, compute: Compute, max_rows: int, max_batches: int, tasks: TaskSet) -> None:
        self._compute = compute
        self._max_rows = max_rows
        self._max_batches = max_batches
        self._tasks = tasks
        self._waiting: deque[_Waiting] = deque()
        self._running = 0

    @property
    def waiting(self) -> int:
        """Requests that no batch has taken yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Batches under way."""
        return self._running

    async def answer(self, request: ForwardRequest, deadline: Deadline) -> Answer:
        """The request's share of the batch that it joins."""
        member = Member(request, deadline)
        if self._running < self._max_batches:  # alone, in the caller's own task
            self._running += 1
            try:
                return (await self._compute([member], deadline))[0]
            finally:
                self._ended()
        waiting = _Waiting(member, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        return await waiting.future

    def _ended(self) -> None:
        self._running -= 1
        batch = self._next_batch()
        if batch:
            self._running += 1
            task = self._tasks.spawn(self._run(batch), "batch")
            for waiting in batch:
                waiting.future.add_done_callback(lambda _: _abandon(batch, task))

    def _next_batch(self) -> list[_Waiting]:
        """Who leaves together now, in the order in which they came."""
        batch: list[_Waiting] = []
        rows = 0
        while self._waiting:
            waiting = self._waiting[0]
            if waiting.future.done():  # expired or cancelled while it waited
                self._waiting.popleft()
                continue
            if batch and rows + waiting.member.rows > self._max_rows:
                break
            batch.append(self._waiting.popleft())
            rows += waiting.member.rows
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        members = [waiting.member for waiting in batch]
        deadline = Deadline(max(member.deadline.at for member in members))
        try:
            answers = await self._compute(members, deadline)
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(answer)
        except MeshError as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(
                        type(error)(error.message, retry_after_s=error.retry_after_s)
                    )
        except Exception as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
        finally:
            self._ended()


def _abandon(batch: list[_Waiting], task: asyncio.Task[None]) -> None:
    """Stops a batch once nobody waits for it any more."""
    if all(waiting.future.done() for waiting in batch):
        task.cancel()


def split(members: list[Member], answer: Answer) -> list[Answer]:
    """Each member's rows of a batch's answer, in the members' order."""
    if len(members) == 1:
        return [answer]
    parts, start = [], 0
    for member in members:
        stop = start + member.rows
        parts.append(
            Answer(
                answer.hidden_states[start:stop],
                answer.expert_ids[start:stop],
                answer.expert_weights[start:stop],
                answer.snapshot,
                None if answer.retried_T is None else answer.retried_T[start:stop],
            )
        )
        start = stop
    return parts
