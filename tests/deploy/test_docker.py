"""deploy/docker: there is no engine here to build with; what can be said without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deploy.manifests import DEPLOY, ROOT

FILES = sorted(
    path for path in (DEPLOY / "docker").glob("Dockerfile.*") if path.suffix != ".dockerignore"
)
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "CMD"}


class Instruction(NamedTuple):
    """One line of a Dockerfile, continuations joined."""

    name: str
    flags: dict[str, str]
    rest: str


def _instructions(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        flags = {}
        while (match := re.match(r"--([\w-]+)=(\S+)\s+", rest)) is not None:
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        found.append(Instruction(name, flags, rest.strip()))
    return found


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _copied(path: Path) -> list[str]:
    """Sources of the repository that a Dockerfile copies."""
    copies = [i for i in _instructions(path) if i.name == "COPY" and "from" not in i.flags]
    return [source for copy in copies for source in copy.rest.split()[:-1]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_a_dockerfile_has_only_instructions_that_exist(path: Path) -> None:
    instructions = _instructions(path)

    assert instructions[0].name == "FROM"
    assert {instruction.name for instruction in instructions} == KNOWN


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_the_base_is_pinned_to_the_ray_that_is_tested_and_the_device(path: Path) -> None:
    bases = [i.rest.split()[0] for i in _instructions(path) if i.name == "FROM"]
    device = {".cpu": "cpu", ".cuda": r"cu\d+"}[path.suffix]

    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(rf"rayproject/ray:{re.escape(_pins()['ray'])}-py311-{device}", bases[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_everything_that_is_copied_is_there_and_not_ignored(path: Path) -> None:
    ignored = path.with_name(path.name + ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}

    assert [source for source in _copied(path) if not (ROOT / source).exists()] == []
    assert ignored[1] == "*"
    assert set(_copied(path)) == kept


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_nothing_is_installed_unpinned(path: Path) -> None:
    pins = _pins()
    for run in (i for i in _instructions(path) if i.name == "RUN"):
        for command in run.rest.split("&&"):
            if "pip install" not in command:
                continue
            pinned = re.findall(r"\^(\w+)==", command)
            assert "--constraint constraints.txt" in command or pinned
            assert all(name in pins for name in pinned)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix)
def test_it_runs_as_a_user_and_starts_our_command(path: Path) -> None:
    instructions = _instructions(path)
    last_stage = max(at for at, i in enumerate(instructions) if i.name == "FROM")
    users = [i.rest for i in instructions[last_stage:] if i.name == "USER"]
    (command,) = [json.loads(i.rest) for i in instructions if i.name == "CMD"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert users == ["ray"]
    assert instructions[-2].name == "USER"
    assert command[0] in scripts


def test_what_is_copied_is_all_that_the_package_needs(tmp_path: Path) -> None:
    """The build stage's own command, on the build stage's own files."""
    source = tmp_path / "source"
    source.mkdir()
    for name in _copied(DEPLOY / "docker/Dockerfile.cpu"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--wheel-dir", "dist", "./source"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=240)

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        metadata = next(name for name in inside if name.endswith("entry_points.txt"))
        entry_points = archive.read(metadata).decode()
    packages = ("expertmesh", "router_service", "expert_service", "load_controller", "fleet")
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    }
    assert ours <= inside
    assert "expertmesh/py.typed" in inside or not (ROOT / "expertmesh/py.typed").exists()
    assert "expertmesh = fleet.cli:main" in entry_points
