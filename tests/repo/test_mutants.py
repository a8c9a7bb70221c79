"""The table of `make mutants` speaks of code that is there. Whether tests notice, that tells."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def table(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "scripts/mutants.toml").read_text())


def test_groups_name_modules_and_tests_that_exist(table: dict[str, Any], root: Path) -> None:
    groups = table["groups"].values()
    paths = [path for group in groups for path in group["modules"] + group["tests"]]

    assert len(paths) > 30
    assert [path for path in paths if not (root / path).exists()] == []


def test_no_module_is_in_two_groups(table: dict[str, Any]) -> None:
    modules = [module for group in table["groups"].values() for module in group["modules"]]

    assert len(modules) == len(set(modules))


def test_a_mutant_that_is_listed_as_equal_changes_code_that_is_there_and_says_why(
    table: dict[str, Any], root: Path
) -> None:
    gone = []
    for entry in table["equal"]:
        source = " ".join((root / entry["module"]).read_text().split())
        if " ".join(entry["was"].split()) not in source or not entry["reason"]:
            gone.append(entry)

    assert gone == []
    assert all(kind["reason"] and re.compile(kind["part"]) for kind in table["equal_kind"])
