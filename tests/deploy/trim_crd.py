"""Makes a JSON schema for tests from a CustomResourceDefinition.

    python -m tests.deploy.trim_crd CRD.yaml ORIGIN > tests/deploy/schemas/KIND.json

ORIGIN says where the file is from (repository, path, commit) and goes into the schema. Kept is what
tells a wrong manifest from a right one: types, names, required fields, enums, bounds. Unknown names
are refused, as `kubectl` does with strict validation. Pod templates are cut out, for they are half
a megabyte: tests check them against Kubernetes' own schema.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_DROPPED = ("description", "default", "format", "x-kubernetes-list-type",
            "x-kubernetes-list-map-keys", "x-kubernetes-map-type",
            "x-kubernetes-validations")  # fmt: skip
_WITHOUT_TEMPLATES = "containers"  # what the spec in a pod template has


def schema_of(crd: dict[str, Any], origin: str) -> dict[str, Any]:
    """The schema of the version that the API server stores."""
    version = next(version for version in crd["spec"]["versions"] if version["storage"])
    schema: dict[str, Any] = _trim(version["schema"]["openAPIV3Schema"])
    properties = schema["properties"]
    properties["apiVersion"] = {"const": f"{crd['spec']['group']}/{version['name']}"}
    properties["kind"] = {"const": crd["spec"]["names"]["kind"]}
    properties["metadata"] = _ANYTHING
    properties.pop("status", None)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"{origin}; licence Apache-2.0; trimmed by tests/deploy/trim_crd.py",
        **schema,
    }


def _trim(node: Any) -> Any:
    if isinstance(node, list):
        return [_trim(each) for each in node]
    if not isinstance(node, dict):
        return node
    if _is_pod_template(node):
        return _ANYTHING
    kept = {}
    for name, value in node.items():
        if name == "properties":
            kept[name] = {each: _trim(schema) for each, schema in value.items()}
        elif name not in _DROPPED:
            kept[name] = _trim(value)
    if kept.pop("x-kubernetes-int-or-string", False):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
    if "properties" in kept and not kept.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    return kept


def _is_pod_template(node: dict[str, Any]) -> bool:
    spec = node.get("properties", {}).get("spec", {})
    return _WITHOUT_TEMPLATES in spec.get("properties", {})


if __name__ == "__main__":
    crd = yaml.safe_load(Path(sys.argv[1]).read_text())
    print(json.dumps(schema_of(crd, sys.argv[2]), indent=1, sort_keys=True))
