"""deploy/grafana and deploy/prometheus: what they ask for is served."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

import expertmesh
from expertmesh.config import RebalanceConfig
from fleet.ports import metrics_ports
from tests.checkpoints import make_checkpoint
from tests.deploy.manifests import DEPLOY, load, one
from tests.mesh import local_mesh, wait_until
from tests.scrape import Family, parse, scrape

TARGET_LABELS = {"job", "instance", "pod"}  # Prometheus adds them to whatever it scrapes
FUNCTIONS = {
    "absent", "by", "delta", "histogram_quantile", "increase", "le", "max", "min", "or", "rate",
    "sum",
}  # fmt: skip
ROWS = ["Requests", "Latency", "Queue", "Balance", "Servers", "Autoscaling", "Placement"]


def _dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana/expertmesh.json").read_text())
    return loaded


def _rules() -> list[dict[str, Any]]:
    (page,) = load(DEPLOY / "prometheus/rules.yaml")
    return [rule for group in page["groups"] for rule in group["rules"]]


def _panels() -> list[dict[str, Any]]:
    return [panel for panel in _dashboard()["panels"] if panel["type"] != "row"]


EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in _rules()} | {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in _panels()
    for target in panel["targets"]
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Family]]:
    """Every metric that services of ours, and Ray's autoscaler, serve after some traffic."""
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    looks_often = RebalanceConfig(window_s=0.5, least_assignments=1, max_violation=1e6)
    with (
        local_mesh(path, metrics=True, rebalance=looks_often) as mesh,
        expertmesh.connect(mesh.address) as client,
    ):
        info = client.describe()
        for layer in info.layers:
            client.forward(torch.randn(3, info.hidden_size), layer.index)
        client.load()
        addresses = [mesh.controller.metrics_address, mesh.routers[0].metrics_address]
        addresses += [server.metrics_address for server in mesh.servers]

        def seen() -> dict[str, Family]:
            return {name: f for each in addresses for name, f in scrape(each).families.items()}

        wait_until(
            lambda: (
                {
                    "expertmesh_controller_executions_total",
                    "expertmesh_controller_window_maxvio",
                    "expertmesh_controller_server_maxvio",
                }
                <= {name for name, family in seen().items() if family.samples}
            ),
            10.0,
            "told of everything",
        )
        registry = CollectorRegistry()
        autoscaler = AutoscalerPrometheusMetrics(session_name="test", registry=registry)
        for gauge in ("active_nodes", "pending_nodes", "recently_failed_nodes"):
            getattr(autoscaler, gauge).labels(SessionName="test", NodeType="cpu").set(0)
        yield seen() | parse(generate_latest(registry).decode()).families


def _family(name: str, served: dict[str, Family]) -> Family | None:
    """The metric that a name in a query belongs to: histograms have three."""
    histogram = served.get(re.sub(r"_(bucket|sum|count)$", "", name))
    if histogram is not None and histogram.kind == "histogram":
        return histogram if name != histogram.name else None
    return served.get(name)


@pytest.mark.parametrize("query", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_every_metric_and_label_of_a_query_exists(served: dict[str, Family], query: str) -> None:
    plain = re.sub(r'"[^"]*"', "", query)
    names = set(re.findall(r"\b(?:expertmesh|autoscaler|process|ray)_\w+", plain))

    assert names
    assert [name for name in names if _family(name, served) is None] == []
    known = TARGET_LABELS.union(*(_family(name, served).labels for name in names))  # type: ignore[union-attr]
    used = {
        label.strip() for by in re.findall(r"by \(([^)]*)\)", plain) for label in by.split(",")
    } | set(re.findall(r"[{,]\s*(\w+)\s*[=!]", plain))
    assert used - known == set()


@pytest.mark.parametrize("query", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_every_value_that_a_query_selects_can_occur(served: dict[str, Family], query: str) -> None:
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", query):
        family = _family(name, served)
        assert family is not None
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            if label in TARGET_LABELS:
                continue
            there = {v for _, labels in family.samples for key, v in labels if key == label}
            assert set(values.split("|")) <= there, label


@pytest.mark.parametrize("query", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_a_query_has_only_known_functions_and_its_brackets_close(query: str) -> None:
    plain = re.sub(r'"[^"]*"', "", query)
    for opening, closing in ("()", "{}", "[]"):
        assert plain.count(opening) == plain.count(closing)
    words = set(re.findall(r"(?<![\w$])([a-z_]+)\s*\(", plain)) - {""}
    assert words <= FUNCTIONS


@pytest.mark.parametrize("rule", _rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_it_means(rule: dict[str, Any]) -> None:
    assert set(rule) - {"for"} == {"alert", "expr", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}


def test_there_are_alerts_for_what_operators_must_hear_of() -> None:
    assert {rule["alert"] for rule in _rules()} >= {
        "ExpertmeshNoReplica",
        "ExpertmeshServerLost",
        "ExpertmeshServerSuspected",
        "ExpertmeshQueueFull",
        "ExpertmeshBalancingDead",
        "ExpertmeshStateNotWritten",
        "ExpertmeshLoopFails",
    }


def test_the_operators_rules_are_the_same() -> None:
    (page,) = load(DEPLOY / "prometheus/rules.yaml")

    assert one("PrometheusRule", "expertmesh")["spec"]["groups"] == page["groups"]


def test_the_dashboard_has_its_rows_and_no_panel_lies_on_another() -> None:
    dashboard = _dashboard()
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"] == ROWS
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len({panel["title"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_dashboard_works_with_any_data_source() -> None:
    dashboard = _dashboard()
    text = json.dumps(dashboard)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}

    assert (dashboard["uid"], "id" in dashboard) == ("expertmesh", False)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"} == variables
    for panel in _panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_prometheus_is_pointed_at_the_ports_of_a_cluster_on_one_machine() -> None:
    (page,) = load(DEPLOY / "prometheus/prometheus.yml")
    (targets,) = page["scrape_configs"][0]["static_configs"]
    ports = metrics_ports(9464, services=2, servers=2, node_each=False)

    assert [int(target.rpartition(":")[2]) for target in targets["targets"]] == [
        *ports.services, *ports.servers,
    ]  # fmt: skip
    assert all((DEPLOY / "prometheus" / name).exists() for name in page["rule_files"])
    files = page["scrape_configs"][1]["file_sd_configs"][0]["files"]
    assert Path(files[0]).name == "prom_metrics_service_discovery.json"
