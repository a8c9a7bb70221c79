"""`expertmesh plan`: of a running cluster, which it leaves as it is, and of traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import expertmesh
from fleet.cli import main
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh

HIDDEN = 64
MOE_LAYER = 1


def _skew(cluster: LocalMesh) -> None:
    """Rows for the first two experts of a layer, which are on one server."""
    ids = torch.tensor([[0, 1]] * 50 + [[2, 3]] * 10)
    rows = torch.randn(len(ids), HIDDEN)
    with expertmesh.connect(cluster.address) as mesh:
        mesh.forward(rows, MOE_LAYER, expert_ids=ids, expert_weights=torch.ones(ids.shape))


def test_a_plan_for_a_running_cluster_says_what_and_why_and_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint("deepseek_v3", tmp_path)
    with local_mesh(tmp_path) as cluster:
        _skew(cluster)
        controller = cluster.controller.controller
        before = (controller.epoch, controller.directory_version, controller.routers)

        code = main(["plan", "--router", cluster.address, "--redundant", "2", "--json"])
        found = json.loads(capfd.readouterr().out)
        assert main(["plan", "--router", cluster.address]) == 0
        text = capfd.readouterr().out

        after = (controller.epoch, controller.directory_version, controller.routers)
    layer = next(each for each in found["layers"] if each["layer"] == MOE_LAYER)
    assert code == 0
    assert after == before
    assert layer["maxvio_before"] > layer["maxvio_after"]
    assert layer["hottest"][0]["expert"] in (0, 1)
    assert {move["action"] for move in layer["moves"]} >= {"load"}
    assert found["load_bytes"] > 0
    assert "Nothing was changed: --apply does it." in text
    assert f"{layer['busiest']} does most, for experts" in text


def test_a_cluster_that_cannot_be_reached_ends_with_1_and_says_so(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = main(["plan", "--router", "127.0.0.1:1", "--json"])

    assert code == 1
    assert json.loads(capfd.readouterr().out)["error"]["reason"] == "UNAVAILABLE"


def test_a_trace_is_simulated_for_every_size_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.csv"
    path.write_text("# experts=32,top_k=4\nat_s,tokens_per_s\n0,100000\n10,100000\n20,100000\n")

    assert main(["plan", "--trace", str(path), "--servers", "3", "6", "--json"]) == 0

    runs = json.loads(capfd.readouterr().out)["runs"]
    assert [run["name"] for run in runs] == ["3 servers", "6 servers"]
    assert [run["servers"]["max"] for run in runs] == [3, 6]
    assert runs[0]["queue_delay_s"]["p99"] > runs[1]["queue_delay_s"]["p99"]


def test_an_autoscaled_trace_is_shown_beside_the_fixed_size_that_is_as_good(
    capfd: pytest.CaptureFixture[str],
) -> None:
    trace = "day:hours=0.5,bursts=1,experts=32,top_k=4,layers=1,peak=1e5"

    settings = ["--set", "autoscale.target_utilization=0.5", "--set", "server.startup_s=5"]
    assert main(["plan", "--trace", trace, "--static", *settings]) == 0

    text = capfd.readouterr().out
    assert "autoscaled" in text
    assert "static, same p99" in text
    assert "MaxVio of servers" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "nowhere.json"], "there is no file nowhere.json, and no trace of that name"),
        (["--trace", "day:size=3"], "no parameter 'size'"),
        (["--trace", "steady", "--servers", "1"], "1 servers of 16 slots do not hold 256 experts"),
        (["--trace", "steady", "--set", "server.slots"], "--set server.slots: expected"),
        (["--trace", "steady", "--set", "server.colour=1"], "server has no setting 'colour'"),
        (["--trace", "steady", "--set", "server.slots=many"], "server.slots is 'many'"),
        (["--trace", "steady", "--set", "autoscale.tolerance=2"], "autoscale.tolerance is 2"),
        (["--servers", "3"], "need a --trace"),
        (["--window", "-1"], "must not be negative"),
    ],
)
def test_what_cannot_be_planned_ends_with_1_and_says_why(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 1

    assert message in capfd.readouterr().err
