"""A server that lives and answers nothing: its device hangs, or all of it is stopped.

Its connections stand, and its heartbeat may go on. A replica holds whatever it holds, so no request
may notice for long, not when the budget for second askings is spent either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import expertmesh
from expertmesh.errors import DeadlineError, UnavailableError
from expertmesh.v1 import router_pb2
from tests.checkpoints import make_checkpoint
from tests.load import Load
from tests.mesh import wait_until
from tests.processes import Service

pytestmark = pytest.mark.chaos

CLIENTS = 12
TIMEOUT_S = 15.0
STALL_S = 0.4  # what a fault may add to the quiet 99th percentile, as a kill may
BACK_S = 10.0  # when a server that answers again must have its share again


class Grey:
    """A router whose budget is spent, and two servers that hold everything and can hang."""

    def __init__(self, path: Path, folder: Path, stack: ExitStack) -> None:
        self._path, self._folder, self._stack = path, folder, stack
        state = str(folder / "state.sqlite")
        self.controller = self._start("load_controller", "--state", state)
        joins = ("--controller", self.controller.address)
        self.router = self._start("tests.grey", "router", str(path), *joins)
        self.servers: dict[str, Service] = {}
        for name in ("s0", "s1"):
            (folder / name).mkdir()
            self.servers[name] = self._start(
                "tests.grey", "server", str(folder / name), str(path), "--server-id", name, *joins
            )
        wait_until(lambda: all(s.connected for s in self.statuses(2)), 60.0, "two servers ready")

    def _start(self, module: str, *arguments: str) -> Service:
        return self._stack.enter_context(Service(module, *arguments))

    def statuses(self, count: int = 0) -> list[router_pb2.ServerStatus]:
        with expertmesh.connect(self.router.address, timeout=30.0) as mesh:
            servers = list(mesh.status().servers)
        return servers if len(servers) >= count else [router_pb2.ServerStatus()]

    def status(self, name: str) -> router_pb2.ServerStatus:
        (found,) = (server for server in self.statuses() if server.server_id == name)
        return found

    def hang(self, name: str) -> None:
        """Its device thread waits from now on, with whatever it is given."""
        (self._folder / name / "hang").touch()

    def held(self, name: str) -> bool:
        """Whether a request has met the fault."""
        return (self._folder / name / "held").exists()

    def go_on(self, name: str) -> None:
        (self._folder / name / "hang").unlink()
        (self._folder / name / "held").unlink(missing_ok=True)

    def assert_whole(self, load: Load, answers: int = 100) -> None:
        """Both are trusted, and both get their part of the load."""
        wait_until(lambda: not any(s.suspected for s in self.statuses()), BACK_S, "all trusted")
        before = {s.server_id: s.answered_rows for s in self.statuses()}
        load.wait_right(answers, 60.0)
        assert all(s.answered_rows > before[s.server_id] for s in self.statuses())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


@pytest.fixture(scope="module")
def grey(
    checkpoint: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Grey]:
    with ExitStack() as stack:
        yield Grey(checkpoint[0], tmp_path_factory.mktemp("state"), stack)


def _counted(address: str) -> int:
    with expertmesh.connect(address) as mesh:
        return int(sum(counts.sum() for counts in mesh.load().counts.values()))


def _stall(
    grey: Grey, load: Load, quiet: int, fault: Callable[[], None], fired: Callable[[], bool]
) -> None:
    """The fault comes, goes unnoticed for as long as it lasts, and no answer is late or wrong."""
    load.wait_right(quiet, 60.0)
    fault_at = time.monotonic()
    fault()
    load.wait_right(quiet, 60.0)
    assert fired(), "the fault hit requests in flight"
    assert load.outcome.wrong == []
    assert load.outcome.errors == []
    stall_s = load.outcome.longest(fault_at)
    assert stall_s <= load.outcome.quantile(0.99, fault_at) + STALL_S


def test_a_device_that_hangs_stalls_no_request_for_long(
    grey: Grey, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    address = grey.router.address
    counted = _counted(address)
    with Load(address, checkpoint[1], CLIENTS, rows=4, timeout=TIMEOUT_S) as load:
        _stall(grey, load, 300, lambda: grey.hang("s0"), lambda: grey.held("s0"))
        hung = grey.status("s0")
        grey.go_on("s0")
        grey.assert_whole(load)

    assert hung.suspected
    assert (hung.state, hung.connected) == ("ready", True), "its event loop lives"
    assert load.outcome.errors == []
    assert _counted(address) - counted == load.assignments(4)


@pytest.mark.parametrize("rows", [4, 4000], ids=["one message", "many chunks"])
def test_a_stopped_server_stalls_no_request_for_long(
    grey: Grey, checkpoint: tuple[Path, torch.nn.Module], rows: int
) -> None:
    clients, quiet = (CLIENTS, 300) if rows < 100 else (4, 40)
    address, stopped = grey.router.address, grey.servers["s0"]
    counted = _counted(address)
    with Load(address, checkpoint[1], clients, rows, timeout=TIMEOUT_S) as load:
        _stall(grey, load, quiet, stopped.pause, lambda: grey.status("s0").suspected)
        wait_until(lambda: grey.status("s0").state == "lost", 20.0, "lost by the controller")
        stopped.resume()
        wait_until(lambda: grey.status("s0").state == "ready", 20.0, "heard again")
        grey.assert_whole(load, quiet // 3)

    assert load.outcome.errors == []
    assert _counted(address) - counted == load.assignments(rows)


def test_where_every_copy_hangs_errors_come_in_time_and_answers_with_the_first_that_goes_on(
    grey: Grey, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    timeout = 1.0
    with Load(grey.router.address, checkpoint[1], CLIENTS, rows=4, timeout=timeout) as load:
        load.wait_right(100, 60.0)
        grey.hang("s0")
        grey.hang("s1")
        wait_until(lambda: len(load.outcome.errors) >= CLIENTS, 20.0, "errors")
        grey.go_on("s1")
        load.wait_right(100, 20.0)
        grey.go_on("s0")
        grey.assert_whole(load)

    assert load.outcome.wrong == []
    assert {type(error) for _, _, error in load.outcome.errors} <= {
        DeadlineError,
        UnavailableError,
    }
    assert all(took <= timeout + 1.0 for _, took, _ in load.outcome.errors)
