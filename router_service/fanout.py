"""Fan out: every pair of a batch is computed exactly once, on whichever servers answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from expertmesh import dispatch
from expertmesh.codec.messages import ExecuteRequest
from expertmesh.config import RouterConfig
from expertmesh.dispatch import Ids, Part
from expertmesh.errors import (
    InternalError,
    OverloadedError,
    SlotNotHeldError,
    StaleEpochError,
    UnavailableError,
)
from expertmesh.placement import SlotMap
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.session import first_mesh_error
from router_service.link import ServerLink
from router_service.pool import ExpertPool
from router_service.routing import RoutedBatch
from router_service.snapshot import Snapshot

#: A server that answers so may be asked again, or another one instead. Its pairs are still missing.
RETRYABLE = (UnavailableError, OverloadedError, StaleEpochError, SlotNotHeldError)

_SAY_WHY_S = 0.02  # given up this long before the deadline, so that the reason reaches the caller

Contribution = tuple[npt.NDArray[np.int64] | None, torch.Tensor]
_Planned = tuple[list[Part], SlotMap, frozenset[str]]  # parts, planned on, servers avoided


@dataclass(slots=True)
class FanOutResult:
    """Partial sums whose pairs are disjoint and together are all pairs of the batch."""

    contributions: list[Contribution]
    retried_T: npt.NDArray[np.int64]  # by row: pairs that had to be sent again


@dataclass(slots=True)
class _Run:
    """One batch on its way."""

    batch: RoutedBatch
    layer: int
    deadline: Deadline
    salt: int
    retried_T: npt.NDArray[np.int64]
    broken: dict[str, int] = field(default_factory=dict)  # internal errors by server

    @property
    def rows(self) -> int:
        return len(self.batch.hidden)

    def count_again(self, part: Part) -> None:
        """Notes that a part's pairs are sent again."""
        pairs_R = (part.expert_ids >= 0).sum(1)
        if part.rows is None:
            self.retried_T += pairs_R
        else:
            self.retried_T[part.rows] += pairs_R


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
        self._hedges = HedgeBudget(config.hedge_burst, config.hedge_share)

    async def run(
        self, batch: RoutedBatch, layer: int, snapshot: Snapshot, deadline: Deadline
    ) -> FanOutResult:
        """All partial sums of the batch.

        Raises UnavailableError when a pair finds no server before the deadline, DeadlineError.
        """
        self._salt += 1
        retried_T = np.zeros(len(batch.hidden), np.int64)
        run = _Run(batch, layer, deadline, self._salt, retried_T)
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
        if len(parts) == 1:
            return await self._part(run, parts[0], slots, avoid)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._part(run, part, slots, avoid)) for part in parts]
        except BaseExceptionGroup as failures:
            raise first_mesh_error(failures) from None
        return [contribution for task in tasks for contribution in task.result()]

    async def _plan_until_placed(
        self, run: _Run, ids: Ids, slots: SlotMap, avoid: frozenset[str]
    ) -> _Planned:
        """A plan for all pairs; waits for servers to come (back) while some pair has none."""
        while True:
            holders = self._pool.holders(slots, run.layer, avoid)
            parts, unplaced = dispatch.plan(ids, holders, run.salt)
            lonely = unplaced >= 0
            if not lonely.any():
                return parts, slots, avoid
            left_s = run.deadline.remaining - _SAY_WHY_S
            if left_s <= 0:
                raise UnavailableError(
                    f"no server that holds expert {int(unplaced[lonely][0])} of layer {run.layer} "
                    "could be asked before the deadline: is one starting? see `expertmesh status`",
                    retry_after_s=1.0,
                )
            pause = self._config.retry_pause_s if avoid else left_s
            await self._pool.wait_change(pause)
            avoid = frozenset()  # after the pause everyone may be asked again
            slots = self._slots()

    async def _part(
        self, run: _Run, part: Part, slots: SlotMap, avoid: frozenset[str]
    ) -> list[Contribution]:
        """One server's part, or the same pairs from others when it fails, until the deadline."""
        while True:
            server = slots.servers[part.server]
            try:
                return await self._ask_or_hedge(run, part, slots, avoid)
            except RETRYABLE as error:
                if isinstance(error, OverloadedError):
                    await asyncio.sleep(min(error.retry_after_s, max(0.0, run.deadline.remaining)))
            except InternalError:
                run.broken[server] = run.broken.get(server, 0) + 1
                if run.broken[server] > 1:  # a bug, not an accident: say so, do not try for ever
                    raise
            run.count_again(part)
            planned = await self._plan_until_placed(
                run, part.ids_among(run.rows), self._slots(), avoid | {server}
            )
            if len(planned[0]) != 1:
                return await self._all(run, planned)
            (part,), slots, avoid = planned

    async def _ask_or_hedge(
        self, run: _Run, part: Part, slots: SlotMap, avoid: frozenset[str]
    ) -> list[Contribution]:
        """The server's answer, or, when it is silent for too long, the first of two answers."""
        server = slots.servers[part.server]
        link = self._pool.link(server)
        if link is None:
            raise UnavailableError(f"expert server {server} has left the directory")
        ask = asyncio.ensure_future(self._ask(run, part, slots, server))
        try:
            rows = run.rows if part.rows is None else len(part.rows)
            patience_s = link.patience_s(rows)
            while not (await asyncio.wait((ask,), timeout=patience_s))[0]:
                if self._may_hedge(run, part, slots, avoid | {server}, link):
                    return await self._race(run, part, slots, avoid, ask)
            self._hedges.earn()
            return await ask
        finally:
            _drop(ask)

    def _may_hedge(
        self, run: _Run, part: Part, slots: SlotMap, avoid: frozenset[str], link: ServerLink
    ) -> bool:
        """Whether replicas hold the part, and it is right to ask them too."""
        holders = self._pool.holders(slots, run.layer, avoid)
        if (dispatch.plan(part.expert_ids, holders, run.salt)[1] >= 0).any():
            return False
        return link.suspect or self._hedges.spend()

    async def _race(
        self,
        run: _Run,
        part: Part,
        slots: SlotMap,
        avoid: frozenset[str],
        ask: asyncio.Future[list[Contribution]],
    ) -> list[Contribution]:
        """Sends a silent server's pairs to replicas too; whoever answers first is taken."""
        server = slots.servers[part.server]
        self.hedges += 1
        run.count_again(part)
        again = part.ids_among(run.rows)
        hedge = asyncio.ensure_future(self._complete(run, again, slots, avoid | {server}))
        try:
            await asyncio.wait((ask, hedge), return_when=asyncio.FIRST_COMPLETED)
            if ask.done() and _succeeded(ask):
                return ask.result()
            if hedge.done() and not _succeeded(hedge):
                return await ask
            if not ask.done() and (link := self._pool.link(server)) is not None:
                link.suspend()
            return await hedge
        finally:
            _drop(hedge)

    async def _ask(self, run: _Run, part: Part, slots: SlotMap, server: str) -> list[Contribution]:
        link = self._pool.link(server)
        if link is None:
            raise UnavailableError(f"expert server {server} has left the directory")
        batch = run.batch
        weights = batch.weights if part.rows is None else batch.weights[part.rows]
        request = ExecuteRequest(
            layer=run.layer,
            hidden_states=dispatch.rows_of(batch.hidden, part.rows),
            expert_ids=torch.from_numpy(part.expert_ids),
            expert_weights=torch.from_numpy(np.ascontiguousarray(weights)),
            epoch=slots.epoch,
        )
        response = await link.execute(request, run.deadline)
        partial = response.hidden_states
        if partial.shape != request.hidden_states.shape:
            raise InternalError(
                f"expert server {server} answered with shape {list(partial.shape)}, expected "
                f"{list(request.hidden_states.shape)}"
            )
        return [(part.rows, partial)]


class HedgeBudget:
    """Keeps second askings to a small share of all, so that they cannot feed an overload."""

    def __init__(self, burst: float, share: float) -> None:
        self._left = self._burst = burst
        self._share = share

    def earn(self) -> None:
        """One part was answered without a second asking."""
        self._left = min(self._burst, self._left + self._share)

    def spend(self) -> bool:
        """Whether one more second asking is within the budget; it is then taken from it."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def _succeeded(future: asyncio.Future[list[Contribution]]) -> bool:
    return not future.cancelled() and future.exception() is None


def _drop(future: asyncio.Future[list[Contribution]]) -> None:
    """Gives up an answer that nobody needs any more; its failure is nobody's news."""
    future.cancel()
    future.add_done_callback(_succeeded)
