"""deploy/kubernetes: right by the schemas, and in agreement with the code and with itself."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)

import expert_service.__main__
import load_controller.__main__
import router_service.__main__
from fleet.cli.main import build_parser
from fleet.resources import EXPERT_SLOT
from tests.deploy.manifests import (
    COMPONENT,
    DEPLOY,
    PART_OF,
    containers,
    files,
    groups,
    head_command,
    launcher,
    load,
    objects,
    one,
    parse,
    schema,
    templates,
)

KUBERNETES = "1.34"
CUSTOM = ("RayCluster", "PodMonitor", "PrometheusRule")
GRACE_S = 60  # a server drains for 5 s, Ray for 45 s


def _check(manifest: dict[str, Any]) -> None:
    """Raises for an object that the API server would refuse, unknown fields included."""
    if manifest["kind"] in CUSTOM:
        jsonschema.Draft202012Validator(schema(manifest["kind"])).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_every_object_is_what_kubernetes_and_its_operators_take(path: Path) -> None:
    documents = load(path)

    assert documents
    for document in documents:
        _check(document)


@pytest.mark.parametrize("name", [name for name, _ in templates()])
def test_every_pod_template_is_what_kubernetes_takes(name: str) -> None:
    _check(
        {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": name.replace(" ", "-")},
            "template": dict(templates())[name],
        }
    )


def _misspell_idle(ray: dict[str, Any]) -> None:
    options = ray["spec"]["autoscalerOptions"]
    options["idleTimeoutSecond"] = options.pop("idleTimeoutSeconds")


def _choose_no_autoscaler(ray: dict[str, Any]) -> None:
    ray["spec"]["autoscalerOptions"]["version"] = "v3"


def _name_slots_by_number(ray: dict[str, Any]) -> None:
    ray["spec"]["workerGroupSpecs"][0]["resources"][EXPERT_SLOT] = 1


@pytest.mark.parametrize("spoil", [_misspell_idle, _choose_no_autoscaler, _name_slots_by_number])
def test_the_schema_of_rayclusters_finds_mistakes(spoil: Callable[[dict[str, Any]], None]) -> None:
    ray = copy.deepcopy(one("RayCluster", "expertmesh"))
    spoil(ray)

    with pytest.raises(jsonschema.ValidationError):
        _check(ray)


@pytest.mark.parametrize("kind", CUSTOM)
def test_a_schema_that_is_not_ours_says_where_it_is_from_and_under_which_licence(kind: str) -> None:
    origin = schema(kind)["$comment"]

    assert re.search(r"github\.com/\S+ \S+\.yaml at \S+; licence Apache-2\.0", origin)


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse("a: 1\nb: {c: 1, c: 2}")


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_yaml_file_loads_strictly(path: Path) -> None:
    assert load(path)


@pytest.mark.parametrize("folder", ["kubernetes", "kubernetes/monitoring"])
def test_a_kustomization_names_every_file_of_its_folder(folder: str) -> None:
    (kustomization,) = load(DEPLOY / folder / "kustomization.yaml")
    there = {path.name for path in (DEPLOY / folder).glob("*.yaml")} - {"kustomization.yaml"}

    assert set(kustomization["resources"]) == there
    assert kustomization["namespace"] == one("Namespace", "expertmesh")["metadata"]["name"]


def test_the_commands_of_containers_have_arguments_that_their_services_take() -> None:
    parsers = {
        "router_service": router_service.__main__._arguments,
        "load_controller": load_controller.__main__._arguments,
        "expert_service": expert_service.__main__._arguments,
    }
    found = {}
    for _, container in containers():
        if container.get("command", [])[:2] == ["python", "-m"]:
            module, *first = container["command"][2:]
            found[module] = (parsers[module]([*first, *container["args"]]), container)

    assert set(found) == {"router_service", "load_controller"}
    for arguments, container in found.values():
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        expected = {"grpc": arguments.port, "metrics": arguments.metrics_port}
        if getattr(arguments, "data_port", 0):
            expected["data"] = arguments.data_port
        assert ports == expected
        probes = [probe for name, probe in container.items() if name.endswith("Probe")]
        asked = [probe["grpc"]["port"] for probe in probes if "grpc" in probe]
        assert asked
        assert set(asked) == {arguments.port}
        variables = {variable["name"] for variable in container["env"]}
        assert {name for name in ("POD_IP", "POD_NAME") if f"$({name})" in str(container["args"])} \
            == variables  # fmt: skip


def test_routers_and_launcher_name_the_load_controllers_service() -> None:
    service = one("Service", "load-controller")
    (port,) = service["spec"]["ports"]
    address = f"{service['metadata']['name']}:{port['port']}"
    (router,) = [c for name, c in containers() if name == "expertmesh-router"]

    assert f"--controller={address}" in router["args"]
    assert build_parser().parse_args(launcher()).controller == address


def test_what_the_launcher_asks_for_fits_the_workers() -> None:
    ray = one("RayCluster", "expertmesh")
    asked = build_parser().parse_args(launcher())
    servers = asked.shards * asked.replicas
    node_types = _derive_autoscaling_config_from_ray_cr(
        {**ray, "metadata": {**ray["metadata"], "namespace": "expertmesh"}}
    )["available_node_types"]
    cpu, gpu, head = (node_types[name]["resources"] for name in ("cpu", "gpu", "headgroup"))

    assert head["CPU"] == 0
    assert cpu[EXPERT_SLOT] == gpu[EXPERT_SLOT] == 1
    assert asked.cpus_per_server <= min(cpu["CPU"], gpu["CPU"])
    assert ("GPU" in cpu, gpu["GPU"]) == (False, 1)
    assert node_types["cpu"]["max_workers"] >= servers
    assert one("PodDisruptionBudget", "expert-server")["spec"]["minAvailable"] == servers - 1
    for name in ("cpu", "gpu"):
        (container,) = groups(ray)[name]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["expert-metrics"] == asked.metrics_port


def test_the_head_tries_the_launcher_again_and_runs_ray_with_its_quoted_arguments(
    tmp_path: Path,
) -> None:
    """The script itself, with an `expertmesh` that fails once and a `ray` that says what it got."""
    programs = {
        "expertmesh": 'echo "$@" >> calls; test $(wc -l < calls) -ge 2 && touch launched',
        "sleep": "exit 0",
        "ray": 'for each in "$@"; do echo "$each"; done; until test -e launched; do :; done',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    started = "ray start --head --resources='{\"expert_slot\":1}' --block"

    done = subprocess.run(
        head_command(),
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBERAY_GEN_RAY_START_CMD": started},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:4] == [
        "start", "--head", '--resources={"expert_slot":1}', "--block",
    ]  # fmt: skip
    assert (tmp_path / "calls").read_text() == 2 * (" ".join(launcher()) + "\n")


def test_the_checkpoint_is_where_everyone_looks_for_it() -> None:
    claims = {each["metadata"]["name"] for each in objects("PersistentVolumeClaim")}
    asked = build_parser().parse_args(launcher()).checkpoint
    readers = [name for name, _ in templates() if name != "load-controller"]

    for name, template in templates():
        spec = template["spec"]
        mounted = {
            mount["mountPath"]: volume["persistentVolumeClaim"]["claimName"]
            for container in spec["containers"]
            for mount in container["volumeMounts"]
            for volume in spec.get("volumes", [])
            if volume["name"] == mount["name"]
        }
        assert (mounted.get("/models") in claims) == (name in readers)
    assert Path(asked).parent == Path("/models")
    (router,) = [c for name, c in containers() if name == "expertmesh-router"]
    assert router["command"][-1] == asked


def test_every_container_runs_an_image_that_this_repository_builds() -> None:
    built = {
        line.split(" -t ")[1].split()[0]
        for path in (DEPLOY / "docker").glob("Dockerfile.*")
        for line in path.read_text().splitlines()
        if " -t " in line
    }
    (kustomization,) = load(DEPLOY / "kubernetes/kustomization.yaml")
    chosen = {f"{image['name']}:{image['newTag']}" for image in kustomization["images"]}

    assert {container["image"] for _, container in containers()} == built == chosen


def test_pods_have_time_to_drain_and_no_privileges() -> None:
    for name, template in templates():
        spec = template["spec"]
        assert spec["terminationGracePeriodSeconds"] >= GRACE_S, name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            for variable in container.get("env", []):
                if variable["name"].startswith("RAY_"):
                    assert variable["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
                    assert hasattr(ray_constants, variable["name"])
                    assert int(variable["value"]) < spec["terminationGracePeriodSeconds"]


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items()
    expressions = selector.get("matchExpressions", [])
    return all(labels.get(key) == value for key, value in wanted) and all(
        expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
        for expression in expressions
    )


def _labels() -> dict[str, dict[str, str]]:
    """Labels that the pods of each template have, KubeRay's own included."""
    kuberay = {"ray.io/cluster": "expertmesh"}
    return {
        name: template["metadata"]["labels"] | (kuberay if name.startswith("ray ") else {})
        for name, template in templates()
    }


def test_selectors_find_the_pods_that_they_are_meant_for() -> None:
    found = {}
    for each in objects():
        spec = each.get("spec", {})
        selector = spec.get("selector", spec.get("podSelector"))
        if selector is None or each["kind"] == "PersistentVolumeClaim":
            continue
        if each["kind"] == "Service":
            selector = {"matchLabels": selector}
        pods = {name for name, labels in _labels().items() if _matches(selector, labels)}
        found[each["kind"], each["metadata"]["name"]] = pods

    workers, ray = {"ray cpu", "ray gpu"}, {"ray head", "ray cpu", "ray gpu"}
    services = {"load-controller", "expertmesh-router"}
    assert found == {
        ("Service", "load-controller"): {"load-controller"},
        ("StatefulSet", "load-controller"): {"load-controller"},
        ("Service", "expertmesh-router"): {"expertmesh-router"},
        ("Deployment", "expertmesh-router"): {"expertmesh-router"},
        ("PodDisruptionBudget", "expertmesh-router"): {"expertmesh-router"},
        ("PodDisruptionBudget", "expert-server"): workers,
        ("NetworkPolicy", "deny-all-ingress"): services | ray,
        ("NetworkPolicy", "clients-to-routers"): {"expertmesh-router"},
        ("NetworkPolicy", "everyone-to-load-controller"): {"load-controller"},
        ("NetworkPolicy", "routers-to-expert-servers"): workers,
        ("NetworkPolicy", "ray-among-itself"): ray,
        ("NetworkPolicy", "prometheus-to-metrics"): services | ray,
        ("PodMonitor", "expertmesh-services"): services,
        ("PodMonitor", "expertmesh-expert-servers"): workers,
        ("PodMonitor", "expertmesh-ray-head"): {"ray head"},
    }


def test_pod_monitors_and_services_name_ports_that_their_pods_have() -> None:
    ports: dict[str, set[str]] = {}
    for name, container in containers():
        ports.setdefault(name, set()).update(port["name"] for port in container["ports"])

    named = 0
    for each in objects("PodMonitor", "Service"):
        spec = each["spec"]
        if each["kind"] == "Service":
            selector = {"matchLabels": spec["selector"]}
            wanted = {port["targetPort"] for port in spec["ports"]}
        else:
            selector = spec["selector"]
            wanted = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
        for name, labels in _labels().items():
            if _matches(selector, labels):
                named += 1
                assert wanted <= ports[name], (each["metadata"]["name"], name)
    assert named == 7


def test_network_policies_open_every_port_that_is_listened_on_and_no_other() -> None:
    opened = {
        port["port"]
        for policy in objects("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for port in rule.get("ports", [])
        if "endPort" not in port
    }
    # Ray's own peers may reach every port of Ray's.
    among_ray = {"gcs-server", "dashboard", "client"}
    listened = {
        port["containerPort"]
        for _, container in containers()
        for port in container["ports"]
        if port["name"] not in among_ray
    }

    assert opened == listened


def test_routers_reach_expert_servers_on_linux_default_range_of_free_ports() -> None:
    policy = one("NetworkPolicy", "routers-to-expert-servers")
    (port,) = policy["spec"]["ingress"][0]["ports"]
    # net.ipv4.ip_local_port_range, from which a server that asks for port 0 is given one.
    assert (port["port"], port["endPort"]) == (32768, 60999)


def test_labels_say_what_belongs_to_expertmesh() -> None:
    for name, labels in _labels().items():
        assert labels[PART_OF] == "expertmesh", name
        assert labels[COMPONENT], name
        # KubeRay's Service finds the head by a name that it gives, unless the template does.
        assert "app.kubernetes.io/name" not in labels
