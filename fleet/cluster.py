"""A running cluster on Ray, and how it ends."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray

from expertmesh.client import connect
from expertmesh.errors import ConfigError
from expertmesh.v1 import router_pb2
from fleet import state
from fleet.ray_session import RaySession
from fleet.ready import get, has_ended
from fleet.roster import Roster
from fleet.steps import run_all
from fleet.watch import Watch

_ANSWER_S = 5.0  # a server that has started answers within this
_STOP_S = 15.0  # a stopping actor may take this long to drain before it is killed


class Cluster:
    """A running cluster. It lives until it is closed, or until the process that made it ends."""

    def __init__(self, session: RaySession) -> None:
        self._session = session
        self._folder: Path | None = None
        self.controller: Any = None
        self.routers: list[Any] = []
        self._started: dict[str, Any] = {}  # expert servers' actors by server id
        self.roster: Roster | None = None  # finds them, where they come and go
        self.supervisor: Any = None
        self.watch: Watch | None = None  # ends what hangs, once it has started
        self.addresses: list[str] = []
        self.controller_address = ""
        self._closed = False

    @property
    def address(self) -> str:
        """ "host:port" of the router; several, separated by commas, when there are several."""
        return ",".join(self.addresses)

    @property
    def servers(self) -> dict[str, Any]:
        """Actors by server id; where they are supervised, those that there are now."""
        return self._started if self.roster is None else self.roster.actors()

    def make_folder(self) -> Path:
        """A folder for the files of its services. Raises ConfigError when there can be none."""
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="expertmesh-"))
        except OSError as error:  # says for which folder, or which ones were tried
            raise ConfigError(
                f"cannot make a folder for temporary files ({error}): name one that can be "
                "written with TMPDIR"
            ) from None
        return self._folder

    def endpoints(self) -> dict[str, str]:
        """ "host:port" of every expert server, by server id.

        Those that were drained are left out; where a supervisor adds servers, also those that have
        not started yet.
        """
        asked = {name: actor.endpoint.remote() for name, actor in self.servers.items()}
        if self.roster is not None:
            up, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
            asked = {name: ref for name, ref in asked.items() if ref in up}
        return {
            name: get(ref, f"expert server {name}")
            for name, ref in asked.items()
            if not has_ended(ref)
        }

    def status(self) -> router_pb2.GetStatusResponse:
        """A router's view of the cluster."""
        with connect(self.address) as mesh:
            return mesh.status()

    def close(self) -> None:
        """Drains and ends every actor of this cluster, and Ray if it was started for it.

        Each of that is done whatever goes wrong with the others; then the first error is raised.
        """
        if self._closed:
            return
        self._closed = True
        run_all(
            ("ending the watch", self._stop_watch),
            ("ending the supervisor", lambda: _stop_all([self.supervisor])),  # it adds none now
            ("ending the routers", lambda: _stop_all(self.routers)),
            ("ending the expert servers", self._stop_servers),
            ("ending the load controller", lambda: _stop_all([self.controller])),
            ("removing the note of the cluster", self._forget),
            ("leaving Ray", self._session.leave),
            ("removing the folder of the cluster", self._remove_folder),
        )

    def watch_over(self, controller: str, after_s: float) -> None:
        """From now on ends what answers nothing for `after_s`, so that Ray starts it anew."""
        services = {f"router {index}": router for index, router in enumerate(self.routers)}
        if self.controller is not None:
            services["load controller"] = self.controller
        if self.supervisor is not None:
            services["supervisor"] = self.supervisor
        self.watch = Watch(controller, services, lambda: self.servers, after_s)
        self.watch.start()

    def _stop_watch(self) -> None:
        if self.watch is not None:
            self.watch.stop()

    def _stop_servers(self) -> None:
        run_all(
            ("ending those of the start", lambda: _stop_all(list(self._started.values()))),
            ("ending those that came since", self._stop_later_servers),
        )

    def _stop_later_servers(self) -> None:
        if self.roster is not None and ray.is_initialized():  # else asking would start a Ray
            later = self.roster.actors().items()
            _stop_all([actor for name, actor in later if name not in self._started])

    def _forget(self) -> None:
        if self.addresses:
            state.forget(self.address)

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _stop_all(actors: Sequence[Any]) -> None:
    """Asks all at once to stop, waits for all, then ends their processes."""
    there = [actor for actor in actors if actor is not None]
    if not ray.is_initialized():  # somebody has ended Ray, and these with it
        return
    run_all(
        ("asking actors to stop", partial(_drain, there)),
        *((f"ending {actor}", partial(ray.kill, actor)) for actor in there),
    )


def _drain(actors: Sequence[Any]) -> None:
    stops = [actor.stop.remote() for actor in actors]
    if stops:
        ray.wait(stops, num_returns=len(stops), timeout=_STOP_S)
