"""Requests that wait for the same layer at the same time, merged into one batch."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from expertmesh import average
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
        return self.request.hidden_states.shape[0]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A member that others may join, and who waits for its answer."""

    member: Member
    future: asyncio.Future[Answer]


Compute = Callable[[list[Member], Deadline], Awaitable[list[Answer]]]


class LayerQueue:
    """Merges what waits for one layer in one dtype.

    A request that finds no batch under way starts at once; the others wait and leave together, up
    to `max_rows`, when a batch ends. Up to `max_batches` are under way at a time. A further one
    starts at once, or, with `overlap_after`, when the newest has taken that many times its usual
    time: few rows read their experts' weights whatever their number, so two batches side by side
    take twice what one of all their rows takes; but one that hangs shall not hold up the others.
    """

    def __init__(
        self,
        compute: Compute,
        max_rows: int,
        max_batches: int,
        tasks: TaskSet,
        overlap_after: float = 0.0,
    ) -> None:
        self._compute = compute
        self._max_rows = max_rows
        self._max_batches = max_batches
        self._tasks = tasks
        self._overlap_after = overlap_after
        self._waiting: deque[_Waiting] = deque()
        self._running = 0
        self._newest_at = 0.0  # when the newest batch started, the loop's clock
        self._usual_s = 0.0  # what a batch takes; 0 before the first has ended
        self._look: asyncio.TimerHandle | None = None

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
        left_s = self._until_start_s()
        if not self._waiting and left_s <= 0:  # alone, in the caller's own task
            self._begin()
            try:
                return (await self._timed([member], deadline))[0]
            finally:
                self._end()
        waiting = _Waiting(member, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if left_s <= 0:
            self._start_next()
        else:
            self._look_later(left_s)
        return await waiting.future

    def _until_start_s(self) -> float:
        """Seconds until a batch may start if none ends before; at most 0 for now."""
        if self._running == 0:
            return 0.0
        if self._running >= self._max_batches:
            return math.inf
        now = asyncio.get_running_loop().time()
        return self._newest_at + self._overlap_after * self._usual_s - now

    def _begin(self) -> None:
        self._newest_at = asyncio.get_running_loop().time()
        self._running += 1

    def _end(self) -> None:
        self._running -= 1
        self._start_next()

    async def _timed(self, members: list[Member], deadline: Deadline) -> list[Answer]:
        started_at = asyncio.get_running_loop().time()
        answers = await self._compute(members, deadline)
        self._learn(asyncio.get_running_loop().time() - started_at)
        return answers

    def _learn(self, took_s: float) -> None:
        """Notes how long a batch took. One that waited for a server is not what is usual."""
        usual = self._usual_s or took_s
        self._usual_s = average.moved(usual, min(took_s, 2.0 * usual))

    def _look_later(self, left_s: float) -> None:
        """Has the queue looked at again in `left_s`, when a batch may start beside the newest."""
        if self._look is None and left_s < math.inf:
            self._look = asyncio.get_running_loop().call_later(max(0.0, left_s), self._looked)

    def _looked(self) -> None:
        self._look = None
        self._start_next()

    def _start_next(self) -> None:
        """Starts a batch of what waits, if one may start now."""
        batch = self._next_batch() if self._until_start_s() <= 0 else []
        if batch:
            self._begin()
            task = self._tasks.spawn(self._settle(batch), "batch")
            # Not in the task itself: one that is cancelled before its first step never runs.
            task.add_done_callback(lambda _: self._end())
            _cancel_unwanted(task, batch)
        if self._waiting:
            self._look_later(self._until_start_s())

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

    async def _settle(self, batch: list[_Waiting]) -> None:
        """Computes one batch and tells everybody in it."""
        members = [waiting.member for waiting in batch]
        deadline = Deadline(max(member.deadline.at for member in members))
        try:
            answers = await self._timed(members, deadline)
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(answer)
        except MeshError as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error.again())
        except Exception as error:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)


def _cancel_unwanted(task: asyncio.Task[None], batch: list[_Waiting]) -> None:
    """Stops a batch once nobody waits for it any more."""
    wanted = len(batch)

    def settled(_: asyncio.Future[Answer]) -> None:
        nonlocal wanted
        wanted -= 1
        if not wanted:
            task.cancel()

    for waiting in batch:
        waiting.future.add_done_callback(settled)


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
