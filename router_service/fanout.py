"""Fan out: every pair of a batch is computed exactly once, on whichever servers answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from expertmesh import dispatch
from expertmesh.codec.messages import ExecuteResponse
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
from router_service.asking import Ask, Run, drop, failed, succeeded, wake
from router_service.pool import ExpertPool
from router_service.probing import Probes
from router_service.routing import RoutedBatch
from router_service.snapshot import Snapshot
from router_service.standing import HedgeBudget

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


class FanOut:
    """Sends a batch's pairs to the servers that hold them, and sends again what fails.

    A part's partial sum counts when the part is answered, whole; a part that fails contributes
    nothing, and its pairs are planned anew. Of a part that was sent twice, because its server was
    slow or silent, one answer is taken and the other dropped. So no pair is missing or doubled.
    """

    def __init__(
        self, pool: ExpertPool, slots: Callable[[], SlotMap], config: RouterConfig
    ) -> None:
        """`slots` gives the newest placement: retries follow it, with the same ids and weights."""
        self._pool = pool
        self._slots = slots
        self._config = config
        self.hedges = 0  # parts asked of a replica because their server was slow or silent
        self._salt = 0
        self._timers = Timers()
        self._budget = HedgeBudget(config.hedge_burst, config.hedge_share)
        self._probes = Probes(pool, self._timers)
        self._sleeping: set[asyncio.Future[None]] = set()  # those that wait for answers
        pool.on_left_out = self._wake_all

    async def run(
        self, batch: RoutedBatch, layer: int, snapshot: Snapshot, deadline: Deadline
    ) -> FanOutResult:
        """All partial sums of the batch.

        Raises UnavailableError when a pair finds no server before the deadline, DeadlineError.
        """
        self._salt += 1
        run = Run(batch, layer, deadline, self._salt)
        self._probes.send(run, snapshot.slots)
        contributions = await self._complete(run, batch.expert_ids, snapshot.slots, frozenset())
        return FanOutResult(contributions, run.retried_T)

    async def _complete(
        self,
        run: Run,
        ids: Ids,
        slots: SlotMap,
        avoid: frozenset[str],
        not_now: frozenset[str] = frozenset(),
    ) -> list[Contribution]:
        """Partial sums for the pairs in `ids`, from servers outside `avoid` as long as any is.

        Those in `not_now` are not asked at first; a second asking may go to them.
        """
        parts, slots, avoided = await self._plan_until_placed(run, ids, slots, avoid | not_now)
        # What was avoided is empty after a pause: from then on everyone may be asked again.
        return await self._all(run, (parts, slots, avoid & avoided))

    async def _all(self, run: Run, planned: _Planned) -> list[Contribution]:
        """Partial sums of every part, asked for at the same time."""
        parts, slots, avoid = planned
        asks = [self._ask(run, part, slots) for part in parts]
        try:
            # Almost always everyone answers in time: one wait for all, and no task for each.
            await self._sleep(run, asks)
            if all(ask.right for ask in asks):
                self._budget.earn(len(asks))
                return [self._take(ask) for ask in asks]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._part(run, ask, slots, avoid)) for ask in asks]
        except BaseExceptionGroup as failures:
            raise first_mesh_error(failures) from None
        finally:
            for ask in asks:
                drop(ask.future)
        return [contribution for task in tasks for contribution in task.result()]

    async def _sleep(self, run: Run, asks: Sequence[Ask]) -> None:
        """Returns when all are answered or one has failed; when it is time to look at one that is
        not; and when a server has been left out."""
        pending: dict[asyncio.Future[ExecuteResponse], Ask] = {}
        look_at = run.deadline.at
        for ask in asks:
            if not ask.future.done():
                pending[ask.future] = ask
                look_at = min(look_at, ask.look_at)
            elif not succeeded(ask.future):
                return
        if not pending:
            return
        left = len(pending)
        enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def answered(future: asyncio.Future[ExecuteResponse]) -> None:
            nonlocal left
            left -= 1
            right = succeeded(future)
            if right:
                pending[future].note_answer()
            if left == 0 or not right:
                wake(enough)

        for future in pending:
            future.add_done_callback(answered)
        timer = self._timers.after(max(0.0, look_at - time.monotonic()), partial(wake, enough))
        self._sleeping.add(enough)
        try:
            await enough
        finally:
            self._sleeping.discard(enough)
            timer.cancel()
            for future in pending:
                if not future.done():
                    future.remove_done_callback(answered)

    def _wake_all(self) -> None:
        """A server has been left out: whoever waits for it looks whether replicas may be asked."""
        for waiter in self._sleeping:
            wake(waiter)

    async def _plan_until_placed(
        self, run: Run, ids: Ids, slots: SlotMap, avoid: frozenset[str]
    ) -> _Planned:
        """A plan for all pairs; waits for servers to come (back) while some pair has none."""
        while True:
            holders = self._pool.holders(slots, run.layer, avoid, run.rows)
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
        self, run: Run, ask: Ask, slots: SlotMap, avoid: frozenset[str]
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
        self, run: Run, ask: Ask, slots: SlotMap, avoid: frozenset[str]
    ) -> list[Contribution]:
        """The server's answer, or, when it is overdue or left out, the first of two answers."""
        try:
            while not ask.future.done():
                not_now = self._second_asking(run, ask, slots, avoid)
                if not_now is not None:
                    return await self._race(run, ask, slots, avoid, not_now)
                await self._sleep_until_deadline(run, ask)
            answer = [self._take(ask)]
            self._budget.earn(1)
            return answer
        finally:
            drop(ask.future)

    async def _sleep_until_deadline(self, run: Run, ask: Ask) -> None:
        if run.deadline.remaining <= 0:
            raise DeadlineError(
                f"expert server {ask.server} did not answer before the deadline: allow more time, "
                "or send fewer rows"
            )
        await self._sleep(run, (ask,))

    def _second_asking(
        self, run: Run, ask: Ask, slots: SlotMap, avoid: frozenset[str]
    ) -> frozenset[str] | None:
        """Whom not to ask, where it is right to ask replicas too and they hold the part.

        See `standing`: who is left out or silent is asked around at once, who is slow as often as
        the budget allows.
        """
        now, link = time.monotonic(), ask.link
        if link is None or not (now >= ask.look_at or ask.left_out):
            return None
        silent_at = link.standing.silent_at(ask.asked_at, ask.rows, ask.patience_s)
        ask.look_at = now + self._config.hedge_after_s
        if silent_at > now:
            ask.look_at = min(ask.look_at, silent_at)
        avoid = avoid | {ask.server}
        unproven = avoid | self._unproven(ask, now)
        trusted = avoid | self._pool.left_out(ask.rows)
        proven = trusted | unproven
        if ask.left_out:
            return self._first_held(run, ask, slots, (proven, trusted, unproven))
        if silent_at <= now:
            run.silent.add(ask.server)
            # At last suspects, too: they may be the ones that answer.
            others = self._first_held(run, ask, slots, (proven, unproven))
            if others is not None:
                return others if link.standing.may_test(now) else None
        others = self._first_held(run, ask, slots, (trusted,))
        return others if others is not None and self._budget.spend() else None

    def _unproven(self, ask: Ask, now: float) -> frozenset[str]:
        """Servers that have something to answer, and have answered nothing while this one did not:
        to ask them shows nothing."""
        since = max(ask.asked_at, now - ask.patience_s)
        return frozenset(
            name
            for name, link in self._pool.links()
            if link.in_flight and not link.standing.answered_since(since, ask.rows)
        )

    def _first_held(
        self, run: Run, ask: Ask, slots: SlotMap, choices: Sequence[frozenset[str]]
    ) -> frozenset[str] | None:
        """The first choice of servers to avoid that leaves some who hold all of a part."""
        for avoid in choices:
            holders = self._pool.holders(slots, run.layer, avoid, ask.rows)
            if dispatch.plan(ask.part.expert_ids, holders, run.salt)[1] is None:
                return avoid
        return None

    async def _race(
        self,
        run: Run,
        ask: Ask,
        slots: SlotMap,
        avoid: frozenset[str],
        not_now: frozenset[str],
    ) -> list[Contribution]:
        """Sends a server's pairs to replicas outside `not_now` too; whoever answers first is taken.

        Where those replicas are silent as well, it is the turn of the others.
        """
        self.hedges += 1
        run.count_again(ask.part)
        again = ask.part.ids_among(run.rows)
        hedge = asyncio.ensure_future(
            self._complete(run, again, slots, avoid | {ask.server}, not_now)
        )
        try:
            await asyncio.wait((ask.future, hedge), return_when=asyncio.FIRST_COMPLETED)
            if not succeeded(ask.future):
                if succeeded(hedge):
                    self._note_lost(ask)
                if succeeded(hedge) or not hedge.done():
                    return await hedge
                ask.look_at = run.deadline.at  # nobody else can answer
                while not ask.future.done():
                    await self._sleep_until_deadline(run, ask)
            return [self._take(ask)]
        finally:
            drop(hedge)

    def _note_lost(self, ask: Ask) -> None:
        """A replica has answered what a server was asked for: was that one silent?"""
        link = ask.link
        if link is None or ask.future.done():
            return
        silent_at = link.standing.silent_at(ask.asked_at, ask.rows, ask.patience_s)
        if time.monotonic() >= silent_at and not link.standing.is_suspect(ask.rows):
            link.suspect(ask.rows, ask.patience_s)
            self._probes.watch(ask.server, link)
            self._wake_all()

    def _ask(self, run: Run, part: Part, slots: SlotMap) -> Ask:
        """Sends one part. What keeps it from being sent is the answer."""
        server = slots.servers[part.server]
        link = self._pool.link(server)
        request, now = run.request(part, slots.epoch), time.monotonic()
        shape = request.hidden_states.shape
        if link is None:
            error = UnavailableError(f"expert server {server} has left the directory")
            return Ask(part, server, None, shape, failed(error), now, 0.0, now)
        patience_s = link.patience_s(request, len(run.silent))
        try:
            future = link.ask(request, run.deadline)
        except MeshError as error:
            future = failed(error)
        return Ask(part, server, link, shape, future, now, patience_s, now + patience_s)

    def close(self) -> None:
        """Gives up what nobody waits for."""
        self._probes.close()
        self._timers.close()

    def _take(self, ask: Ask) -> Contribution:
        """The contribution of an answered part. Raises what the server answered."""
        if isinstance(failure := ask.future.exception(), MeshError):
            # Raised itself, it would hold the rows of the batch, and through its future itself.
            raise failure.again()
        ask.note_answer()
        partial = ask.future.result().hidden_states
        if partial.shape != ask.shape:
            raise InternalError(
                f"expert server {ask.server} answered with shape {list(partial.shape)}, expected "
                f"{list(ask.shape)}"
            )
        return ask.part.rows, partial
