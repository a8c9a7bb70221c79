"""deploy/README.md: its commands parse, and what it points to is there."""

from __future__ import annotations

import re
import shlex

import pytest

import expert_service.__main__
import load_controller.__main__
import router_service.__main__
from fleet.cli.main import build_parser
from tests.deploy.manifests import DEPLOY

PAGE = (DEPLOY / "README.md").read_text()
PARSERS = {
    "router_service": router_service.__main__._arguments,
    "load_controller": load_controller.__main__._arguments,
    "expert_service": expert_service.__main__._arguments,
}


def _commands() -> list[str]:
    """Commands of ours in indented blocks, also those that `ray exec` is given in quotes."""
    blocks = "\n".join(re.findall(r"^    (.*)$", PAGE, re.MULTILINE)).replace("\\\n", " ")
    lines = [
        quoted for line in blocks.splitlines() for quoted in re.findall(r"'(.*)'", line) or [line]
    ]
    return [line for line in lines if line.startswith(("expertmesh ", "python -m "))]


@pytest.mark.parametrize("command", _commands())
def test_a_command_of_the_page_has_arguments_that_exist(command: str) -> None:
    words = shlex.split(command)

    if words[0] == "expertmesh":
        assert build_parser().parse_args(words[1:]).run
    else:
        assert PARSERS[words[2]](words[3:])


def test_the_page_shows_how_to_start_everything() -> None:
    started = {
        words[2] if words[0] == "python" else words[1] for words in map(str.split, _commands())
    }

    assert started == {"serve", "status", *PARSERS}


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(
        re.findall(
            r"(?<![\w/])(?:deploy/)?((?:kubernetes|ray|docker|prometheus|grafana)/[\w./-]*\w)", PAGE
        )
    )

    assert named
    assert [name for name in named if not (DEPLOY / name).exists()] == []
