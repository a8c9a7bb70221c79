"""Moves experts by itself: counts a window, decides, migrates, again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from expertmesh.config import RebalanceConfig
from expertmesh.errors import MeshError
from expertmesh.model import Slot
from expertmesh.v1 import control_pb2 as pb
from load_controller.controller import LoadController
from load_controller.migration import Copy
from load_controller.mover import Mover
from load_controller.planner import Move
from load_controller.rebalancer import Decision, Rebalancer, decide

_log = logging.getLogger(__name__)


class RebalanceLoop:
    """One loop of a load controller. Used from its event loop."""

    def __init__(
        self, controller: LoadController, mover: Mover, config: RebalanceConfig | None
    ) -> None:
        """Without a configuration it only looks, until `enable` lets it act by the default one."""
        self._controller = controller
        self._mover = mover
        self._config = config or RebalanceConfig()
        self._rebalancer = Rebalancer(self._config)
        self._decision = Decision("nothing was decided yet")
        self._decided_at: float | None = None
        self.done = self.failed = self.loaded = 0  # migrations, and the slots that they loaded
        said = controller.rebalancing_setting()
        self.enabled = config is not None if said is None else said

    def enable(self, enabled: bool) -> None:
        """Lets it act from now on, or not; kept over restarts."""
        self._controller.set_rebalancing(enabled)
        self.enabled = enabled
        _log.info("experts move by themselves: %s", "yes" if enabled else "no")

    async def run(self) -> None:
        """Turns until cancelled."""
        self._rebalancer.observe(self._controller.accounts.assignments())
        while True:
            await asyncio.sleep(self._config.window_s)
            self._rebalancer.observe(self._controller.accounts.assignments())
            try:
                await self.turn()
            except Exception:  # a bug in a decision must not end it: the next load is another one
                self.failed += 1
                _log.exception("rebalancing failed, and is tried again")

    async def turn(self) -> None:
        """Decides once, and moves what shall move."""
        view = self._rebalancer.view(time.monotonic())
        servers = self._controller.holders()
        # For a large model this takes a second or two: not on the loop that answers routers.
        decision = await asyncio.to_thread(decide, view, servers, self._config)
        if decision.reason != self._decision.reason and decision.moves:
            _log.info("rebalancing: %s", decision.reason)
        self._decision, self._decided_at = decision, time.monotonic()
        if decision.moves and self.enabled:
            await self._move(decision)

    async def _move(self, decision: Decision) -> None:
        loads, drops = _copies(decision.moves, "load"), _copies(decision.moves, "drop")
        try:
            await self._migrate(decision, loads, drops)
        finally:  # also after what nobody expected: the next try has to wait
            self._rebalancer.moved(time.monotonic())

    async def _migrate(self, decision: Decision, loads: list[Copy], drops: list[Copy]) -> None:
        try:
            migrated = await self._mover.migrate(loads, drops)
        except MeshError as error:
            self.failed += 1
            self._decision = Decision(f"{decision.reason}; failed: {error.message}")
            _log.warning("rebalancing failed, and is tried again: %s", error.message)
        else:
            self.done += 1
            self.loaded += migrated.loaded
            _log.info("rebalanced: %d slots loaded, %d dropped, epoch %d", migrated.loaded,
                      migrated.dropped, migrated.epoch)  # fmt: skip

    def report(self, now: float) -> pb.RebalanceReport:
        """What it last decided."""
        return pb.RebalanceReport(
            enabled=self.enabled,
            reason=self._decision.reason,
            layers=[
                pb.LayerViolation(layer=layer, max_violation=each.now, planned=each.planned)
                for layer, each in sorted(self._decision.layers.items())
            ],
            done=self.done,
            failed=self.failed,
            loaded=self.loaded,
            age_s=-1.0 if self._decided_at is None else now - self._decided_at,
        )


def _copies(moves: Iterable[Move], action: str) -> list[Copy]:
    return [
        Copy(move.server, Slot(move.layer, move.expert)) for move in moves if move.action == action
    ]
