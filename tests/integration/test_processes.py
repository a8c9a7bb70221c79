"""Services as processes, without Ray: a killed server, a silent one, bad starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import expertmesh
from tests.checkpoints import make_checkpoint
from tests.load import Load
from tests.processes import Cluster, cluster


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Cluster, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    with cluster(path, tmp_path_factory.mktemp("state"), shards=2, replicas=2) as started:
        yield started, model


def _retried(address: str) -> int:
    with expertmesh.connect(address) as mesh:
        return mesh.status().retried_pairs


def test_a_server_killed_under_load_changes_no_answer(
    running: tuple[Cluster, torch.nn.Module],
) -> None:
    services, model = running
    before = _retried(services.router.address)
    with Load(services.router.address, model, clients=16, rows=3, timeout=20.0) as load:
        load.wait_right(50, 60.0)
        services.servers["s0r0"].kill()
        load.wait_right(200, 60.0)

    assert load.outcome.wrong == []
    assert load.outcome.errors == []
    assert _retried(services.router.address) > before, "the fault hit requests in flight"
    services.servers["s0r0"].__exit__(None, None, None)
    services.start_server("s0r0", "0/2")
    services.wait_ready(4)


def test_a_silent_server_is_answered_for_by_its_replica(
    running: tuple[Cluster, torch.nn.Module],
) -> None:
    services, model = running
    before = _retried(services.router.address)
    with Load(services.router.address, model, clients=8, rows=3, timeout=20.0) as load:
        load.wait_right(50, 60.0)
        services.servers["s1r0"].pause()
        load.wait_right(100, 60.0)
        services.servers["s1r0"].resume()

    assert load.outcome.wrong == []
    assert load.outcome.errors == []
    assert _retried(services.router.address) > before, "the fault hit requests in flight"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["expert_service", "/nowhere"], "/nowhere"),
        (["expert_service", "{path}", "--shard", "2/2"], "--shard is '2/2'"),
        (["expert_service", "{path}", "--dtype", "int8"], "dtype is 'int8'"),
        (["expert_service", "{path}", "--backend", "abacus"], "abacus"),
        (["router_service", "/nowhere", "--controller", "127.0.0.1:1"], "/nowhere"),
        (["load_controller", "--state", "{state}", "--balance", "upwards"], "upwards"),
    ],
)
def test_a_service_that_cannot_start_says_why_and_exits_with_1(
    running: tuple[Cluster, torch.nn.Module],
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    filled = [a.format(path=running[0].path, state=tmp_path / "s.sqlite") for a in arguments]

    done = subprocess.run(
        [sys.executable, "-m", *filled], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
