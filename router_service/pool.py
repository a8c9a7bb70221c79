"""Every expert server a router knows: who can be asked for what, right now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import numpy as np

from expertmesh.config import RouterConfig
from expertmesh.dispatch import Holders
from expertmesh.placement import SlotMap
from expertmesh.rpc.tasks import TaskSet
from expertmesh.v1 import router_pb2
from router_service.link import ServerLink, rate

_NOBODY: frozenset[str] = frozenset()
_RATES_EVERY_S = 0.05  # how stale queue lengths may be when rows are spread over replicas


class ExpertPool:
    """Keeps one link to each announced server. Used from one event loop."""

    def __init__(self, digest: str, config: RouterConfig) -> None:
        self._digest = digest
        self._config = config
        self._links: dict[str, ServerLink] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self.tasks = TaskSet()
        self._version = 0
        self._changed: asyncio.Future[None] | None = None
        self._cache: dict[tuple[int, frozenset[str], frozenset[str]], Holders] = {}
        self._cached_for: tuple[int, int, float] = (-1, -1, 0.0)
        self._doubted: dict[str, ServerLink] = {}  # lost, or suspected of losing something
        #: Called when the controller has lost servers: who waits for one may ask others.
        self.on_left_out: Callable[[], None] = lambda: None

    def update(self, servers: Iterable[router_pb2.ServerStatus]) -> None:
        """Takes a new directory."""
        announced = {server.server_id: server for server in servers}
        for server_id in self._links.keys() - announced.keys():
            self._links.pop(server_id)
            self._runs.pop(server_id).cancel()
        for server_id, server in announced.items():
            link = self._links.get(server_id)
            if link is not None:
                link.update(server)
            elif server.endpoint:
                link = ServerLink(server, self._digest, self._config, self._bump)
                self._links[server_id] = link
                self._runs[server_id] = self.tasks.keep(link.run, "server link", server_id)
        before = self._doubted.keys()
        self._bump()
        if self._doubted.keys() - before:
            self.on_left_out()

    def placed(self) -> None:
        """Experts have other servers now: who waits for one looks again."""
        self._bump()

    def link(self, server_id: str) -> ServerLink | None:
        """The link to a server, if it is announced."""
        return self._links.get(server_id)

    def links(self) -> list[tuple[str, ServerLink]]:
        """Every announced server's id and link, by id."""
        return sorted(self._links.items())

    def can_be_asked(self, server_id: str) -> bool:
        """Whether requests can be sent to the server now."""
        link = self._links.get(server_id)
        # A server that the controller has lost may still be there for us.
        return link is not None and link.connected and link.announced.state in ("ready", "lost")

    def left_out(self, rows: int) -> frozenset[str]:
        """Servers that are asked for so many rows only where no other server can be."""
        if not self._doubted:
            return _NOBODY
        return frozenset(name for name, link in self._doubted.items() if link.left_out(rows))

    def holders(
        self, slots: SlotMap, layer: int, avoid: frozenset[str] = _NOBODY, rows: int = 1
    ) -> Holders:
        """Who can be asked for each expert of a layer, in a batch of so many rows.

        Servers in `avoid` count as gone. Those that are left out do as well, for experts that
        another server holds.
        """
        left_out = self.left_out(rows)
        now = time.monotonic()
        epoch, version, since = self._cached_for
        if (epoch, version) != (slots.epoch, self._version) or now - since > _RATES_EVERY_S:
            self._cache.clear()
            self._cached_for = (slots.epoch, self._version, now)
        key = (layer, avoid, left_out)
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._make_holders(slots, layer, avoid, left_out)
        return found

    def _make_holders(
        self, slots: SlotMap, layer: int, avoid: frozenset[str], left_out: frozenset[str]
    ) -> Holders:
        up = np.array([self.can_be_asked(s) and s not in avoid for s in slots.servers], np.bool_)
        # What the plan knows of a server's speed, times what its queue says of this moment.
        rates = np.array(
            [
                slots.rates.get(s, 1.0) * rate(self._links[s]) if s in self._links else 0.0
                for s in slots.servers
            ]
        )
        holds = slots.holds[layer] & up[:, None]
        if left_out:
            trusted = holds & np.array([s not in left_out for s in slots.servers])[:, None]
            holds = np.where(trusted.any(0), trusted, holds)
        return Holders(holds, rates)

    async def wait_change(self, timeout_s: float) -> None:
        """Returns when a server came, went or moved, or after `timeout_s`."""
        if self._changed is None or self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.wait((self._changed,), timeout=timeout_s)

    def statuses(self) -> list[router_pb2.ServerStatus]:
        """The directory, with what this router knows besides."""
        listed = []
        for _, link in self.links():
            entry = router_pb2.ServerStatus()
            entry.CopyFrom(link.announced)
            entry.connected = link.connected
            entry.error = entry.error or link.error
            entry.requests_in_flight = link.in_flight
            entry.answered_rows = link.answered_rows
            entry.suspected = link.standing.suspected
            entry.transport = link.transport
            listed.append(entry)
        return listed

    async def close(self) -> None:
        """Closes every link."""
        await self.tasks.close()

    def _bump(self) -> None:
        self._version += 1
        self._doubted = {name: link for name, link in self._links.items() if link.doubted}
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
