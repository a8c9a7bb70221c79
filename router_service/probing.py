"""Brings suspected servers back: copies a part to them now and then, to see whether it returns."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from expertmesh import dispatch
from expertmesh.codec.messages import ExecuteResponse
from expertmesh.dispatch import Part
from expertmesh.errors import MeshError
from expertmesh.placement import SlotMap
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.timers import Timers
from router_service.asking import Run, drop, succeeded
from router_service.link import ServerLink
from router_service.pool import ExpertPool


class Probes:
    """Owns the probes that are under way: at most one a server, and nobody waits for any."""

    def __init__(self, pool: ExpertPool, timers: Timers) -> None:
        self._pool = pool
        self._timers = timers
        self._suspects: dict[str, ServerLink] = {}
        self._sent: set[asyncio.Future[ExecuteResponse]] = set()

    def watch(self, server: str, link: ServerLink) -> None:
        """From now on the server is probed, until it is trusted again."""
        self._suspects[server] = link

    def send(self, run: Run, slots: SlotMap) -> None:
        """Copies to each suspect that is due some of what it could be asked for of this batch."""
        for server, link in list(self._suspects.items()):
            if not link.standing.suspected or self._pool.link(server) is not link:
                del self._suspects[server]
            elif link.connected and link.standing.probe_due(time.monotonic(), run.rows):
                self._probe(run, slots, server, link)

    def _probe(self, run: Run, slots: SlotMap, server: str, link: ServerLink) -> None:
        part = self._part_for(run, slots, server, link.standing.probe_rows)
        if part is None:
            return
        request, now = run.request(part, slots.epoch), time.monotonic()
        rows, patience_s = request.hidden_states.shape[0], link.patience_s(request)
        if not link.standing.probe_due(now, rows):
            return
        given_up_s = link.standing.probe(now, patience_s)
        try:
            future = link.ask(request, Deadline.after(given_up_s))
        except MeshError:
            return
        run.count_again(part)
        self._sent.add(future)
        timer = self._timers.after(given_up_s, future.cancel)

        def ended(_: asyncio.Future[ExecuteResponse]) -> None:
            timer.cancel()
            self._sent.discard(future)
            if succeeded(future):  # a probe's failure is nobody's news
                link.answered(now, rows, patience_s)

        future.add_done_callback(ended)

    def _part_for(self, run: Run, slots: SlotMap, server: str, rows: int) -> Part | None:
        """The pairs of at most so many rows of a batch that one server holds; None without any."""
        others = frozenset(slots.servers) - {server}
        holders = self._pool.holders(slots, run.layer, others, run.rows)
        parts, _ = dispatch.plan(run.batch.expert_ids, holders, run.salt)
        if not parts:
            return None
        (part,) = parts
        some = np.arange(run.rows) if part.rows is None else part.rows
        # By their numbers, even where they are all: so they are copied. The probe outlives the
        # batch, into whose memory the answer may be written.
        return Part(part.server, some[:rows], part.expert_ids[:rows])

    def close(self) -> None:
        """Gives up every probe."""
        for future in list(self._sent):
            drop(future)
