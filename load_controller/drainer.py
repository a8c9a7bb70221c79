"""Takes a server out: others get what only it holds, then it is told to drain."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from expertmesh.errors import InvalidRequestError, UnavailableError
from expertmesh.v1 import expert_pb2
from load_controller.controller import LoadController
from load_controller.migration import Copy, plan_steps
from load_controller.mover import Mover

_log = logging.getLogger(__name__)
_CALL_S = 30.0


class Drainer:
    """Used from one event loop."""

    def __init__(self, controller: LoadController, mover: Mover) -> None:
        self._controller = controller
        self._mover = mover

    async def drain(self, server: str, loads: Iterable[Copy], drops: Iterable[Copy]) -> int:
        """Moves what is asked for, then drains the server. How many slots were loaded.

        Nobody else moves experts from the first move to the server's last word, so that no copy
        that somebody relies on goes with it. Raises what `Mover.migrate` raises;
        InvalidRequestError where the server is unknown or would take an expert's last copy along,
        UnavailableError where it is away; the server stays then.
        """
        controller = self._controller
        state = controller.state_of(server)
        if state == "draining":
            return 0
        if state == "lost":
            raise UnavailableError(
                f"expert server {server} is lost: it cannot be told to drain. End its process, or "
                "wait for its return",
                retry_after_s=1.0,
            )
        with self._mover.alone():
            loaded = 0
            if state == "ready":
                steps = plan_steps(controller.shown(), loads, drops)
                loaded = (await self._mover.run(steps)).loaded
                self._check(server)
            request = expert_pb2.DrainRequest()
            await self._mover.call(controller.address_of(server), server, "Drain", request, _CALL_S)
            controller.mark_draining(server)
        _log.info("server %s drains; %d slots were loaded elsewhere for it", server, loaded)
        return loaded

    def _check(self, server: str) -> None:
        """Raises InvalidRequestError where nobody else that is ready holds what the server does."""
        shown = self._controller.shown()
        mine = shown.pop(server, frozenset())
        others = frozenset().union(*shown.values()) if shown else frozenset()
        if last := mine - others:
            slot = min(last)
            raise InvalidRequestError(
                f"server {server} holds the last copy of {len(last)} experts, of expert "
                f"{slot.expert} of layer {slot.layer} among them: it stays. Move them away first",
                field="server_id",
            )
