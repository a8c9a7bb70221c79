"""deploy/ray/cluster.yaml: what `ray up` checks, checked without a cloud."""

from __future__ import annotations

import copy
import shlex
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from fleet.resources import EXPERT_SLOT
from tests.deploy.manifests import DEPLOY, ROOT, load


def _config() -> dict[str, Any]:
    (config,) = load(DEPLOY / "ray/cluster.yaml")
    loaded: dict[str, Any] = config
    return loaded


def test_ray_takes_the_file() -> None:
    validate_config(prepare_config(_config()))


@pytest.mark.parametrize("path", [("max_worker",), ("docker", "imagine"), ("provider", "type")])
def test_rays_schema_finds_mistakes(path: tuple[str, ...]) -> None:
    config = copy.deepcopy(_config())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    if path[-1] in inner:
        del inner[path[-1]]
    else:
        inner[path[-1]] = 1

    with pytest.raises(Exception, match=path[-1]):
        validate_config(prepare_config(config))


def test_commands_have_only_flags_that_ray_start_takes() -> None:
    config = _config()
    flags = {flag for option in scripts.start.params for flag in option.opts}
    starts = [
        command.split(";")[-1]
        for group in ("head", "worker")
        for command in config[f"{group}_start_ray_commands"]
        if "ray start" in command
    ]

    assert len(starts) == 2
    for start in starts:
        used = {word.split("=")[0] for word in shlex.split(start) if word.startswith("--")}
        assert used <= flags
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[0]


def test_every_worker_takes_one_expert_server_and_the_head_none() -> None:
    types = _config()["available_node_types"]

    assert types["head"]["resources"] == {"CPU": 0}
    assert {types[name]["resources"][EXPERT_SLOT] for name in ("cpu", "gpu")} == {1}
    assert types["gpu"]["resources"]["GPU"] == 1


def test_the_checkpoint_and_the_images_are_ones_that_are_here() -> None:
    config = _config()
    built = "\n".join(path.read_text() for path in (DEPLOY / "docker").glob("Dockerfile.c*"))
    images = [
        config["docker"]["image"],
        config["available_node_types"]["gpu"]["docker"]["worker_image"],
    ]

    assert all(
        (ROOT / source / "config.json").exists() for source in config["file_mounts"].values()
    )
    assert all(f"-t {image} ." in built for image in images)
