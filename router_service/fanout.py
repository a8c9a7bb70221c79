"""Fan out: every pair of a batch is computed exactly once, on whichever servers answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expertmesh import dispatch
from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.config import RouterConfig
from expertmesh.dispatch import Contribution, Ids, Part
from expertmesh.errors import (
    DeadlineError,
    InternalError,
    MeshError,
    OverloadedError,
    SlotNotHeldError,
    StaleEpochError,
    UnavailableError,
)
from expertmesh.placement import SlotMap
from expertmesh.rpc.answering import first_mesh_error
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.timers import Timers
from router_service.link import ServerLink
from router_service.pool import ExpertPool
from router_service.routing import RoutedBatch
from router_service.snapshot import Snapshot

#: A server that answers so may be asked again, or another one instead. Its pairs are still missing.
RETRYABLE = (UnavailableError, OverloadedError, StaleEpochError, SlotNotHeldError)

_LOOK_S = 0.5  # at the latest, whoever waits for a server looks again
_SAY_WHY_S = 0.02  # given up this long before the deadline, so that the reason reaches the caller

_Planned = tuple[list[Part], SlotMap, frozenset[str]]  # parts, planned on, servers avoided


@dataclass(slots=True)
class FanOutResult:
    """Partial sums whose pairs are disjoint and together are all pairs of the batch."""

    contributions: list[Contribution]
    #: By row: pairs that had to be sent again; None where none had.
    retried_T: npt.NDArray[np.int64] | None


@dataclass(slots=True)
class _Run:
    """One batch on its way."""

    batch: RoutedBatch
    layer: int
    deadline: Deadline
    salt: int
    retried_T: npt.NDArray[np.int64] | None = None  # see FanOutResult
    broken: dict[str, int] = field(default_factory=dict)  # internal errors by server

    @property
    def rows(self) -> int:
        return self.batch.hidden.shape[0]

    def count_again(self, part: Part) -> None:
        """Notes that a part's pairs are sent again."""
        if self.retried_T is None:
            self.retried_T = np.zeros(self.rows, np.int64)
        pairs_R = (part.expert_ids >= 0).sum(1)
        if part.rows is None:
            self.retried_T += pairs_R
        else:
            self.retried_T[part.rows] += pairs_R


@dataclass(slots=True)
class _Ask:
    """One part, as one server was asked for it."""

    part: Part
    server: str
    link: ServerLink | None  # None for a server that has left the directory
    shape: torch.Size  # of the answer
    future: asyncio.Future[ExecuteResponse]
    patience_s: float  # how long to wait before a replica may be asked too
    asked_at: float = field(default_factory=time.monotonic)
    looked_at: float = 0.0  # when the patience with the server last ended

    @property
    def right(self) -> bool:
        """Whether the answer is here, and is one."""
        return _succeeded(self.future) and self.future.result().hidden_states.shape == self.shape

    def until_look_s(self) -> float:
        """Seconds until the patience with the server ends; 0 when it has."""
        since = self.looked_at or self.asked_at
        return max(0.0, since + self.patience_s - time.monotonic())


class FanOut:
    """Sends a batch's pairs to the servers that hold them, and sends again what fails.

    A part's partial sum counts when the part is answered, whole; a part that fails contributes
    nothing, and its pairs are planned anew. Of a part that was sent twice, because its server was
    silent, one answer is taken and the other dropped. So no pair is missing or doubled.
    """

    def __init__(
        self, pool: ExpertPool, slots: Callable[[], SlotMap], config: RouterConfig
    ) -> None:
        """`slots` gives the newest placement: retries follow it, with the same ids and weights."""
        self._pool = pool
        self._slots = slots
        self._config = config
        self.hedges = 0  # parts asked of a replica because their server was silent
        self._salt = 0
        self._timers = Timers()
        self._hedges = HedgeBudget(config.hedge_burst, config.hedge_share)

    async def run(
        self, batch: RoutedBatch, layer: int, snapshot: Snapshot, deadline: Deadline
    ) -> FanOutResult:
        """All partial sums of the batch.

        Raises UnavailableError when a pair finds no server before the deadline, DeadlineError.
        """
        self._salt += 1
        run = _Run(batch, layer, deadline, self._salt)
        contributions = await self._complete(run, batch.expert_ids, snapshot.slots, frozenset())
        return FanOutResult(contributions, run.retried_T)

    async def _complete(
        self, run: _Run, ids: Ids, slots: SlotMap, avoid: frozenset[str]
    ) -> list[Contribution]:
        """Partial sums for the pairs in `ids`, from servers outside `avoid` as long as any is."""
        return await self._all(run, await self._plan_until_placed(run, ids, slots, avoid))

    async def _all(self, run: _Run, planned: _Planned) -> list[Contribution]:
        """Partial sums of every part, asked for at the same time."""
        parts, slots, avoid = planned
        asks = [self._ask(run, part, slots) for part in parts]
        try:
            # Almost always everyone answers in time: one wait for all, and no task for each.
            await self._wait_for_all(run, asks)
            if all(ask.right for ask in asks):
                self._hedges.earn(len(asks))
                return [self._take(ask) for ask in asks]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._part(run, ask, slots, avoid)) for ask in asks]
        except BaseExceptionGroup as failures:
            raise first_mesh_error(failures) from None
        finally:
            for ask in asks:
                _drop(ask.future)
        return [contribution for task in tasks for contribution in task.result()]

    async def _wait_for_all(self, run: _Run, asks: list[_Ask]) -> None:
        """Returns when all are answered, one has failed, or the patience with one ends."""
        futures = [ask.future for ask in asks if not ask.future.done()]
        if not futures:
            return
        left, enough = len(futures), asyncio.get_running_loop().create_future()

        def answered(future: asyncio.Future[ExecuteResponse]) -> None:
            nonlocal left
            left -= 1
            if left == 0 or not _succeeded(future):
                _wake(enough)

        for future in futures:
            future.add_done_callback(answered)
        patience_s = min(ask.patience_s for ask in asks)
        wait_s = max(0.0, min(patience_s, run.deadline.remaining))
        timer = self._timers.after(wait_s, partial(_wake, enough))
        try:
            await enough
        finally:
            timer.cancel()
            for future in futures:
                if not future.done():
                    future.remove_done_callback(answered)

    async def _plan_until_placed(
        self, run: _Run, ids: Ids, slots: SlotMap, avoid: frozenset[str]
    ) -> _Planned:
        """A plan for all pairs; waits for servers to come (back) while some pair has none."""
        while True:
            holders = self._pool.holders(slots, run.layer, avoid)
            parts, unplaced = dispatch.plan(ids, holders, run.salt)
            if unplaced is None:
                return parts, slots, avoid
            left_s = run.deadline.remaining - _SAY_WHY_S
            if left_s <= 0:
                raise UnavailableError(
                    f"no server that holds expert {int(unplaced[unplaced >= 0][0])} of layer "
                    f"{run.layer} could be asked before the deadline: is one starting? see "
                    "`expertmesh status`",
                    retry_after_s=1.0,
                )
            pause = self._config.retry_pause_s if avoid else min(left_s, _LOOK_S)
            await self._pool.wait_change(pause)
            avoid = frozenset()  # after the pause everyone may be asked again
            slots = self._slots()

    async def _part(
        self, run: _Run, ask: _Ask, slots: SlotMap, avoid: frozenset[str]
    ) -> list[Contribution]:
        """The answer to one asking, or the same pairs from others when it fails, until the
        deadline."""
        while True:
            try:
                return await self._answer_or_hedge(run, ask, slots, avoid)
            except RETRYABLE as error:
                if isinstance(error, OverloadedError):
                    await asyncio.sleep(min(error.retry_after_s, max(0.0, run.deadline.remaining)))
            except InternalError:
                run.broken[ask.server] = run.broken.get(ask.server, 0) + 1
                if run.broken[ask.server] > 1:  # a bug, no accident: say so, do not try for ever
                    raise
            run.count_again(ask.part)
            planned = await self._plan_until_placed(
                run, ask.part.ids_among(run.rows), self._slots(), avoid | {ask.server}
            )
            if len(planned[0]) != 1:
                return await self._all(run, planned)
            (part,), slots, avoid = planned
            ask = self._ask(run, part, slots)

    async def _answer_or_hedge(
        self, run: _Run, ask: _Ask, slots: SlotMap, avoid: frozenset[str]
    ) -> list[Contribution]:
        """The server's answer, or, when it is silent for too long, the first of two answers."""
        try:
            while not (await self._wait(run, ask)):
                if self._may_hedge(run, ask, slots, avoid | {ask.server}):
                    return await self._race(run, ask, slots, avoid)
            self._hedges.earn(1)
            return [self._take(ask)]
        finally:
            _drop(ask.future)

    async def _wait(self, run: _Run, ask: _Ask) -> bool:
        """Whether the answer is here once the patience with the server has ended."""
        left_s = run.deadline.remaining
        if left_s <= 0:
            raise DeadlineError(
                f"expert server {ask.server} did not answer before the deadline: allow more time, "
                "or send fewer rows"
            )
        wait_s = min(ask.until_look_s(), left_s)
        if not (await asyncio.wait((ask.future,), timeout=wait_s))[0]:
            ask.looked_at = time.monotonic()
            return False
        return True

    def _may_hedge(self, run: _Run, ask: _Ask, slots: SlotMap, avoid: frozenset[str]) -> bool:
        """Whether replicas hold the part, and it is right to ask them too."""
        holders = self._pool.holders(slots, run.layer, avoid)
        if dispatch.plan(ask.part.expert_ids, holders, run.salt)[1] is not None:
            return False
        return (ask.link is not None and ask.link.suspect) or self._hedges.spend()

    async def _race(
        self, run: _Run, ask: _Ask, slots: SlotMap, avoid: frozenset[str]
    ) -> list[Contribution]:
        """Sends a silent server's pairs to replicas too; whoever answers first is taken."""
        self.hedges += 1
        run.count_again(ask.part)
        again = ask.part.ids_among(run.rows)
        hedge = asyncio.ensure_future(self._complete(run, again, slots, avoid | {ask.server}))
        try:
            await asyncio.wait((ask.future, hedge), return_when=asyncio.FIRST_COMPLETED)
            if ask.future.done() and _succeeded(ask.future):
                return [self._take(ask)]
            if hedge.done() and not _succeeded(hedge):
                while not (await self._wait(run, ask)):
                    continue
                return [self._take(ask)]
            if not ask.future.done() and ask.link is not None:
                ask.link.suspend()
            return await hedge
        finally:
            _drop(hedge)

    def _ask(self, run: _Run, part: Part, slots: SlotMap) -> _Ask:
        """Sends one part. What keeps it from being sent is the answer."""
        server = slots.servers[part.server]
        link = self._pool.link(server)
        batch = run.batch
        weights = batch.weights if part.rows is None else batch.weights[part.rows]
        request = ExecuteRequest(
            layer=run.layer,
            hidden_states=dispatch.rows_of(batch.hidden, part.rows),
            expert_ids=part.expert_ids,
            expert_weights=weights,
            epoch=slots.epoch,
        )
        shape = request.hidden_states.shape
        if link is None:
            error = UnavailableError(f"expert server {server} has left the directory")
            return _Ask(part, server, None, shape, _failed(error), 0.0)
        try:
            future = link.ask(request, run.deadline)
        except MeshError as error:
            future = _failed(error)
        return _Ask(part, server, link, shape, future, link.patience_s(shape[0]))

    def _take(self, ask: _Ask) -> Contribution:
        """The contribution of an answered part. Raises what the server answered."""
        if isinstance(failure := ask.future.exception(), MeshError):
            # Raised itself, it would hold the rows of the batch, and through its future itself.
            raise failure.again()
        partial = ask.future.result().hidden_states
        if partial.shape != ask.shape:
            raise InternalError(
                f"expert server {ask.server} answered with shape {list(partial.shape)}, expected "
                f"{list(ask.shape)}"
            )
        if ask.link is not None:
            ask.link.learn(ask.shape[0], time.monotonic() - ask.asked_at)
        return ask.part.rows, partial


class HedgeBudget:
    """Keeps second askings to a small share of all, so that they cannot feed an overload."""

    def __init__(self, burst: float, share: float) -> None:
        self._left = self._burst = burst
        self._share = share

    def earn(self, parts: int) -> None:
        """So many parts were answered without a second asking."""
        self._left = min(self._burst, self._left + parts * self._share)

    def spend(self) -> bool:
        """Whether one more second asking is within the budget; it is then taken from it."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _failed(error: MeshError) -> asyncio.Future[ExecuteResponse]:
    future: asyncio.Future[ExecuteResponse] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


def _succeeded(future: asyncio.Future[Any]) -> bool:
    """Whether it is done, and well."""
    return future.done() and not future.cancelled() and future.exception() is None


def _drop(future: asyncio.Future[Any]) -> None:
    """Gives up an answer that nobody needs any more; its failure is nobody's news."""
    if not future.cancel() and not future.cancelled():
        future.exception()
    else:
        future.add_done_callback(_succeeded)
