"""README tells the truth: its quick start runs, and what it points to exists."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

_QUICK_START_S = 240.0


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text()


def _blocks(page: str, heading: str) -> list[Block]:
    """The fenced blocks of the section whose heading holds these words."""
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    found = [part for part in sections if heading in part.partition("\n")[0].lower()]
    assert len(found) == 1, f"README needs one section called {heading!r}"
    fences = re.findall(r"^```(\w*)\n(.*?)^```", found[0], flags=re.MULTILINE | re.DOTALL)
    return [Block(*fence) for fence in fences]


@pytest.mark.ray
@pytest.mark.slow
def test_the_quick_start_runs_and_prints_what_it_says(readme: str, root: Path) -> None:
    blocks = _blocks(readme, "quick start")
    programs = [block.text for block in blocks if block.language == "python"]
    said = "".join(block.text for block in blocks if block.language == "text")

    assert programs
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=_QUICK_START_S,
        check=False,
    )

    assert found.returncode == 0, found.stderr
    assert doctest.OutputChecker().check_output(
        said, found.stdout, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    ), found.stdout


def test_the_quick_start_names_commands_that_exist(readme: str, root: Path) -> None:
    makefile = (root / "Makefile").read_text()
    text = "\n".join(block.text for block in _blocks(readme, "quick start"))
    targets = re.findall(r"^(?:\$ )?make (\w+)", text, flags=re.MULTILINE)

    assert targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def test_the_map_shows_what_is_there(readme: str, root: Path) -> None:
    lines = _blocks(readme, "map")[0].text.splitlines()
    paths = [line.split()[0] for line in lines if line.strip()]

    assert [path for path in paths if not (root / path).exists()] == []


def test_every_link_to_a_file_leads_to_one(readme: str, root: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", readme)

    assert [link for link in links if not (root / link).exists()] == []
