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
    retried_T: npt.NDArray[np.int64]  # by row: pairs that had to be sent again


@dataclass(slots=True, eq=False)
class Member:
    """One request in a batch. It expires and is cancelled alone."""

    request: ForwardRequest
    deadline: Deadline
    future: asyncio.Future[Answer]

    @property
    def rows(self) -> int:
        """Rows of this request."""
        return len(self.request.hidden_states)


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
        self._waiting: deque[Member] = deque()
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
        member = Member(request, deadline, asyncio.get_running_loop().create_future())
        self._waiting.append(member)
        if self._running < self._max_batches:
            self._start()
        return await member.future

    def _start(self) -> None:
        members: list[Member] = []
        rows = 0
        while self._waiting:
            member = self._waiting[0]
            if member.future.done():  # expired or cancelled while it waited
                self._waiting.popleft()
                continue
            if members and rows + member.rows > self._max_rows:
                break
            members.append(self._waiting.popleft())
            rows += member.rows
        if members:
            self._running += 1
            task = self._tasks.spawn(self._run(members), "batch")
            for member in members:
                member.future.add_done_callback(lambda _: _abandon(members, task))

    async def _run(self, members: list[Member]) -> None:
        deadline = Deadline(max(member.deadline.at for member in members))
        try:
            answers = await self._compute(members, deadline)
            for member, answer in zip(members, answers, strict=True):
                if not member.future.done():
                    member.future.set_result(answer)
        except MeshError as error:
            for member in members:
                if not member.future.done():
                    member.future.set_exception(
                        type(error)(error.message, retry_after_s=error.retry_after_s)
                    )
        except Exception as error:
            for member in members:
                if not member.future.done():
                    member.future.set_exception(error)
        finally:
            self._running -= 1
            if self._waiting:
                self._start()


def _abandon(members: list[Member], task: asyncio.Task[None]) -> None:
    """Stops a batch once nobody waits for it any more."""
    if all(member.future.done() for member in members):
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
                answer.retried_T[start:stop],
            )
        )
        start = stop
    return parts
