"""One of two routers is stopped: it takes what it is sent, and answers nothing. Clients go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import torch

import expertmesh
from expertmesh.errors import UnavailableError
from tests.checkpoints import make_checkpoint
from tests.load import Load
from tests.mesh import wait_until
from tests.processes import Cluster, Service, cluster

pytestmark = pytest.mark.chaos

CLIENTS, ROWS = 16, 4
STALL_S = 0.4  # what the fault may add to the quiet 99th percentile
SOON_S = 2.0  # for a control call that has ten seconds
BACK_S = 5.0


class TwoRouters:
    """A cluster with two routers, and a model to compare its answers with."""

    def __init__(self, running: Cluster, second: Service, model: torch.nn.Module) -> None:
        self.first, self.second, self.model = running.router, second, model
        self.addresses = f"{self.first.address},{self.second.address}"

    def answered_by_first(self) -> int:
        with expertmesh.connect(self.first.address) as mesh:
            statuses = mesh.statuses()
        return sum(s.answered_requests for s in statuses if s.pid == self.first.process.pid)

    def load(self, timeout: float = 20.0) -> Load:
        return Load(self.addresses, self.model, CLIENTS, ROWS, timeout=timeout)


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRouters]:
    path, folder = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("state")
    model = make_checkpoint("deepseek_v3", path)
    with (
        cluster(path, folder, shards=1, replicas=1) as running,
        Service(
            "router_service", str(path), "--controller", running.controller.address,
            "--router-id", "router-1",
        ) as second,
        expertmesh.connect(second.address) as mesh,
    ):  # fmt: skip
        wait_until(lambda: mesh.status().ready, 20.0, "the second router ready")
        yield TwoRouters(running, second, model)


@pytest.fixture
def stopped(routers: TwoRouters) -> Iterator[TwoRouters]:
    """The same, with the first router stopped."""
    routers.first.pause()
    yield routers
    routers.first.resume()


def _counted(address: str) -> int:
    with expertmesh.connect(address) as mesh:
        return int(sum(counts.sum() for counts in mesh.load().counts.values()))


def test_a_stopped_router_stalls_no_request_for_long_and_is_back_when_it_goes_on(
    routers: TwoRouters,
) -> None:
    before = _counted(routers.addresses)
    with routers.load() as load:
        load.wait_right(400, 60.0)
        stopped_at = time.monotonic()
        routers.first.pause()
        load.wait_right(400, 60.0)
        suspects = load.suspects()
        routers.first.resume()
        wait_until(lambda: not load.suspects(), BACK_S, "the router trusted again")
        answered = routers.answered_by_first()
        load.wait_right(200, 60.0)
        assert routers.answered_by_first() > answered, "it gets its share again"

    assert suspects == [routers.first.address], "the fault hit requests in flight"
    assert load.outcome.wrong == []
    assert load.outcome.errors == []
    quiet_s = load.outcome.quantile(0.99, stopped_at)
    assert load.outcome.longest(stopped_at) <= quiet_s + STALL_S
    assert _counted(routers.addresses) - before == load.assignments(ROWS)


def test_a_client_that_comes_while_a_router_is_stopped_asks_the_other(
    stopped: TwoRouters,
) -> None:
    started = time.monotonic()
    with expertmesh.connect(stopped.addresses) as mesh:
        connected = time.monotonic()
        loads = [mesh.load() for _ in range(3)]
        statuses = mesh.statuses()
        status = mesh.status()
        hidden = torch.randn(ROWS, mesh.describe().hidden_size)
        mesh.forward(hidden, 1)
        ended = time.monotonic()

    assert connected - started < SOON_S
    assert ended - connected < SOON_S
    assert all(load.counts for load in loads)
    assert [each.pid for each in statuses] == [stopped.second.process.pid]
    assert status.pid == stopped.second.process.pid


def test_an_asyncio_client_does_not_wait_for_a_stopped_router_either(
    stopped: TwoRouters,
) -> None:
    async def run() -> list[int]:
        async with expertmesh.connect_async(stopped.addresses) as mesh:
            await mesh.load()
            await mesh.forward(torch.randn(ROWS, mesh.describe().hidden_size), 1)
            return [each.pid for each in await mesh.statuses()]

    started = time.monotonic()
    pids = asyncio.run(run())

    assert pids == [stopped.second.process.pid]
    assert time.monotonic() - started < 2 * SOON_S


def test_where_every_router_is_stopped_errors_come_in_time_and_the_first_that_goes_on_answers(
    routers: TwoRouters,
) -> None:
    timeout = 1.0
    with routers.load(timeout) as load:
        load.wait_right(100, 60.0)
        routers.first.pause()
        routers.second.pause()
        wait_until(lambda: len(load.outcome.errors) >= CLIENTS, 20.0, "errors")
        with pytest.raises(UnavailableError):
            expertmesh.connect(routers.addresses, timeout=1.0)
        routers.second.resume()
        load.wait_right(100, 20.0)
        routers.first.resume()
        wait_until(lambda: not load.suspects(), BACK_S, "both routers trusted again")
        load.wait_right(100, 20.0)

    assert load.outcome.wrong == []
    assert all(took <= timeout + 0.5 for _, took, _ in load.outcome.errors)
