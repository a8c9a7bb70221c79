"""Who calls whom, as the code says it, is what deploy/kubernetes/network-policy.yaml lets through.

A package calls a service where it makes its stub, or names its method; it serves the one that its
SERVICE names. Each package runs in pods of one component.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import pytest

from tests.deploy.manifests import COMPONENT, ROOT, containers, objects, templates

#: By package: the component whose pods run it.
RUNS_IN = {
    "router_service": "router",
    "expert_service": "expert-server",
    "load_controller": "load-controller",
    "fleet": "ray-head",  # the launcher, the supervisor, and the commands
}
OURS = "expertmesh"  # the namespace
FREE = range(32768, 61000)  # Linux' own range of free ports: where expert servers listen
_PREFIX = "expertmesh.v1."
# Read once: to load a file takes longer than all that is asked of it.
POLICIES, TEMPLATES, CONTAINERS = objects("NetworkPolicy"), [*templates()], [*containers()]


@functools.cache
def _trees(package: str) -> list[ast.AST]:
    return [ast.parse(path.read_text()) for path in sorted((ROOT / package).rglob("*.py"))]


def _nodes(package: str) -> list[ast.AST]:
    return [node for tree in _trees(package) for node in ast.walk(tree)]


def calls(package: str) -> set[str]:
    """Names of the services that a package calls, as "RouterService"."""
    found = set()
    for node in _nodes(package):
        match node:
            case ast.Attribute(attr=name) if name.endswith("ServiceStub"):
                found.add(name.removesuffix("Stub"))
            case ast.Constant(value=str(text)) if text.startswith(f"/{_PREFIX}"):
                found.add(text.split("/")[1].removeprefix(_PREFIX))
            # Our own client calls routers.
            case ast.ImportFrom(module="expertmesh.client" | "expertmesh", names=names) if {
                "connect", "connect_async",
            } & {each.name for each in names}:  # fmt: skip
                found.add("RouterService")
    return found


def serves(package: str) -> set[str]:
    """Names of the services that a package serves."""
    return {
        node.value.value.removeprefix(_PREFIX)
        for node in _nodes(package)
        if isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == ["SERVICE"]
        and isinstance(node.value, ast.Constant)
    }


def opens_data_connections(package: str) -> bool:
    """Whether a package connects to data ports: itself, or through our client."""
    imported = {
        each.name
        for node in _nodes(package)
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }
    return "data_port" in imported or "RouterService" in calls(package)


SERVERS = {service: package for package in RUNS_IN for service in serves(package)}
EDGES = sorted((package, SERVERS[service]) for package in RUNS_IN for service in calls(package))


def _ports(package: str, data: bool) -> list[int]:
    """Where pods of a package are called; one port at each end of a range."""
    component = RUNS_IN[package]
    if component == "expert-server":
        return [FREE[0], FREE[-1]]
    labels = {name: template["metadata"]["labels"][COMPONENT] for name, template in TEMPLATES}
    named = {
        port["name"]: port["containerPort"]
        for name, container in CONTAINERS
        if labels[name] == component
        for port in container["ports"]
    }
    return [named["grpc"], *([named["data"]] if data and "data" in named else [])]


def _labels(component: str) -> dict[str, str]:
    """What a component's pods are labelled, KubeRay's own label included."""
    ray = component in ("ray-head", "expert-server")
    kuberay = {"ray.io/cluster": "expertmesh"} if ray else {}
    found = [t["metadata"]["labels"] for _, t in TEMPLATES]
    return kuberay | next(labels for labels in found if labels[COMPONENT] == component)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "read more of the selector here"
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def _comes_from(peer: dict[str, Any], labels: dict[str, str], namespace: dict[str, str]) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}, "read more of the peer here"
    ours = namespace["kubernetes.io/metadata.name"] == OURS
    there = _selects(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else ours
    return there and _selects(peer.get("podSelector", {}), labels)


def _allows(rule: dict[str, Any], port: int) -> bool:
    ports = rule.get("ports")
    if ports is None:
        return True
    assert all(isinstance(each["port"], int) for each in ports)
    return any(each["port"] <= port <= each.get("endPort", each["port"]) for each in ports)


def admitted(component: str, port: int, labels: dict[str, str], namespace: dict[str, str]) -> bool:
    """Whether a pod with those labels, in that namespace, reaches a component's pods there."""
    policies = [
        policy["spec"]
        for policy in POLICIES
        if _selects(policy["spec"]["podSelector"], _labels(component))
    ]
    if not policies:
        return True
    return any(
        _allows(rule, port) and any(_comes_from(peer, labels, namespace) for peer in rule["from"])
        for policy in policies
        for rule in policy.get("ingress", [])
    )


INSIDE = {"kubernetes.io/metadata.name": OURS}


def test_the_calls_are_found_in_the_code() -> None:
    """Else all that follows would hold of nothing."""
    assert SERVERS.keys() == {"RouterService", "ExpertService", "ControlService"}
    assert set(EDGES) == {
        ("router_service", "load_controller"),
        ("router_service", "expert_service"),
        ("expert_service", "load_controller"),
        ("load_controller", "expert_service"),
        ("fleet", "load_controller"),
        ("fleet", "router_service"),
        ("fleet", "expert_service"),
    }
    assert opens_data_connections("router_service")
    assert opens_data_connections("fleet")
    assert not opens_data_connections("load_controller")


@pytest.mark.parametrize(("caller", "called"), EDGES)
def test_whoever_calls_a_service_may_reach_its_ports(caller: str, called: str) -> None:
    for port in _ports(called, opens_data_connections(caller)):
        assert admitted(RUNS_IN[called], port, _labels(RUNS_IN[caller]), INSIDE), port


#: Who calls nobody there. Ray's pods reach each other on every port, for Ray needs many; and
#: whatever belongs to expertmesh may speak to the load controller.
STRANGERS = [
    (caller, called)
    for caller in RUNS_IN
    for called in SERVERS.values()
    if (caller, called) not in EDGES
    and not {RUNS_IN[caller], RUNS_IN[called]} <= {"ray-head", "expert-server"}
    and called != "load_controller"
]


@pytest.mark.parametrize(("caller", "called"), STRANGERS)
def test_whoever_calls_nobody_there_is_kept_out(caller: str, called: str) -> None:
    for port in _ports(called, data=True):
        assert not admitted(RUNS_IN[called], port, _labels(RUNS_IN[caller]), INSIDE), port


def test_clients_reach_routers_and_nobody_else() -> None:
    client = {"kubernetes.io/metadata.name": "team", "expertmesh.io/client": "true"}
    stranger = {"kubernetes.io/metadata.name": "team"}

    for called in SERVERS.values():
        for port in _ports(called, data=True):
            is_router = called == "router_service"
            assert admitted(RUNS_IN[called], port, {"app": "any"}, client) == is_router
            assert not admitted(RUNS_IN[called], port, {"app": "any"}, stranger)


def test_prometheus_reaches_every_metrics_port_and_nobody_else_does() -> None:
    monitoring = {"kubernetes.io/metadata.name": "monitoring"}
    labels = {name: template["metadata"]["labels"][COMPONENT] for name, template in TEMPLATES}
    checked = 0
    for name, container in CONTAINERS:
        for port in container["ports"]:
            if "metrics" in port["name"]:
                where = labels[name], port["containerPort"]
                assert admitted(*where, {"app": "prometheus"}, monitoring)
                assert not admitted(*where, _labels("router"), INSIDE)
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize("name", ["load-controller", "expertmesh-router"])
def test_probes_are_answered_by_the_event_loop(name: str) -> None:
    """A TCP connection is taken by the kernel, also of a process that hangs."""
    (container,) = [container for found, container in CONTAINERS if found == name]

    alive, ready = {"port": container["ports"][0]["containerPort"], "service": "liveness"}, "grpc"
    assert container["livenessProbe"]["grpc"] == alive
    assert container["startupProbe"]["grpc"] == alive, "no longer than alive, or it is restarted"
    assert container["readinessProbe"][ready] == {"port": alive["port"]}
    assert container["livenessProbe"]["timeoutSeconds"] > 1, "a busy loop is not a hung one"


def test_no_container_is_probed_by_a_connection_alone() -> None:
    probes = [
        (name, kind)
        for name, container in CONTAINERS
        for kind, probe in container.items()
        if kind.endswith("Probe") and "tcpSocket" in probe
    ]

    assert probes == []
