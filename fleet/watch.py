"""Ends actors that hang, so that Ray starts them anew. A thread of the process that launched them.

Two have to agree before an expert server is ended: the load controller has not heard from it, and
it does not answer this process either. One that is cut off from one of them goes on serving.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray

from expertmesh.errors import MeshError
from fleet import control
from fleet.hung import Answer, Silence

_log = logging.getLogger(__name__)
LOOK_S = 1.0
_END_S = 10.0  # a look under way ends within this: it waits for the load controller at most
_SERVICE = "service "  # before the names of what is no expert server


class Watch:
    """Looks at a cluster's actors until it is stopped."""

    def __init__(
        self,
        controller: str,
        services: Mapping[str, Any],
        servers: Callable[[], Mapping[str, Any]],
        after_s: float,
    ) -> None:
        """`controller` is "host:port"; `services` and `servers` are actors by name and server id,
        all of which have started. Who says nothing for `after_s` hangs.
        """
        self._controller = controller
        self._services = {_SERVICE + name: actor for name, actor in services.items()}
        self._servers = servers
        self._after_s = after_s
        actors = {**self._services, **servers()}
        self._silence = Silence(after_s, LOOK_S, started=actors)
        self._asked = {name: actor.ping.remote() for name, actor in actors.items()}
        self._stopped = threading.Event()
        self._problem = ""
        self.looks = 0
        #: How often each was ended because it hung.
        self.restarts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="expertmesh-watch", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends nobody from now on."""
        self._stopped.set()
        self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            try:
                self._look()
                self._problem = ""
            except Exception as error:  # also what Ray raises: none of it may end the thread
                if self._problem != repr(error):
                    _log.warning("looking for servers that hang: %r; it is tried again", error)
                self._problem = repr(error)

    def _look(self) -> None:
        if not ray.is_initialized():  # asking would start one
            return
        servers = self._servers()
        actors = {**self._services, **servers}
        self._asked = {name: ref for name, ref in self._asked.items() if name in actors}
        answers = {name: _answer(self._asked.get(name)) for name in actors}
        for name, answer in answers.items():
            if answer is not Answer.PENDING:
                self._asked[name] = actors[name].ping.remote()
        heard, lost = self._fleet()
        excused = set(servers) - lost
        for name in self._silence.hung(answers, heard, excused, time.monotonic()):
            if not self._stopped.is_set():
                self._restart(name, actors[name])
        self.looks += 1

    def _fleet(self) -> tuple[dict[str, str], set[str]]:
        """Incarnations of the servers that the load controller hears, by server id, and the servers
        that it has lost; nothing while it does not say.
        """
        try:
            fleet = control.get_fleet(self._controller)
        except MeshError:
            return {}, set()
        servers = [each.server for each in fleet.servers]
        heard = {each.server_id: each.incarnation for each in servers if each.state != "lost"}
        return heard, {each.server_id for each in servers if each.state == "lost"}

    def _restart(self, name: str, actor: Any) -> None:
        is_service = name.startswith(_SERVICE)
        _log.warning(
            "%s has answered nothing for %.0f s%s: it is ended and started anew",
            f"the {name.removeprefix(_SERVICE)}" if is_service else f"expert server {name}",
            self._after_s,
            "" if is_service else ", neither here nor at the load controller",
        )
        ray.kill(actor, no_restart=False)
        self.restarts[name.removeprefix(_SERVICE)] += 1


def _answer(ref: Any) -> Answer:
    if ref is None:
        return Answer.AWAY  # nobody has asked
    if not ray.wait([ref], timeout=0)[0]:
        return Answer.PENDING
    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return Answer.AWAY
    return Answer.GIVEN
