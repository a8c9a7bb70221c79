"""What is in deploy/, loaded strictly."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
PART_OF = "app.kubernetes.io/part-of"
COMPONENT = "app.kubernetes.io/component"


class _Strict(yaml.SafeLoader):
    """PyYAML, which keeps the last of two equal keys in silence, but refusing them."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"{node.start_mark}: {sorted(twice)} twice")
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse(text: str) -> list[Any]:
    """Every document of a YAML text. Raises ValueError for a key that is there twice."""
    return list(yaml.load_all(text, _Strict))


def load(path: Path) -> list[Any]:
    """Every document of a YAML file."""
    return parse(path.read_text())


def files() -> list[Path]:
    """Every YAML file for Kubernetes but kustomizations."""
    found = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
    return [path for path in found if path.name != "kustomization.yaml"]


def objects(*kinds: str) -> list[dict[str, Any]]:
    """Every object for Kubernetes, of those kinds if any are named."""
    every = [document for path in files() for document in load(path)]
    return [each for each in every if not kinds or each["kind"] in kinds]


def one(kind: str, name: str) -> dict[str, Any]:
    """The object of that kind and name."""
    (found,) = [each for each in objects(kind) if each["metadata"]["name"] == name]
    return found


def schema(kind: str) -> dict[str, Any]:
    """The schema of a custom resource: tests/deploy/trim_crd.py."""
    loaded: dict[str, Any] = json.loads((SCHEMAS / f"{kind}.json").read_text())
    return loaded


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A RayCluster's groups by name; the head's is "head"."""
    workers = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"], **workers}


def templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template, with a name for it."""
    for each in objects("Deployment", "StatefulSet"):
        yield each["metadata"]["name"], each["spec"]["template"]
    for name, group in groups(one("RayCluster", "expertmesh")).items():
        yield f"ray {name}", group["template"]


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every container, with the name of its template."""
    for name, template in templates():
        for container in template["spec"]["containers"]:
            yield name, container


def head_command() -> list[str]:
    """What the Ray head's container runs."""
    (container,) = groups(one("RayCluster", "expertmesh"))["head"]["template"]["spec"]["containers"]
    return [*container["command"], *container["args"]]


def launcher() -> list[str]:
    """The arguments of `expertmesh` in the Ray head's command."""
    words = shlex.split(head_command()[-1].replace("\\\n", " "))
    start = words.index("expertmesh")
    return words[start + 1 : words.index("do", start)]
