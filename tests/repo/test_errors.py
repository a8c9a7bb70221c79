"""The error table is total: code, documentation and protos name the same errors."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import grpc
import pytest

from expertmesh import errors
from expertmesh.errors import BY_REASON, ConfigError, MeshError, from_wire

# All capitals with an underscore, yet neither a reason nor a status code nor an enum value.
OTHER_WORDS = {"UPPER_SNAKE_CASE"}
#: What else is copied by its type: a decoder layer, and weights; `self` is how `again` does it.
NO_ERRORS = {"layer", "self", "weights"}


def _subclasses(kind: type[MeshError]) -> set[type[MeshError]]:
    found = {kind}
    for child in kind.__subclasses__():
        found |= _subclasses(child)
    return found


ALL = _subclasses(MeshError)
ON_THE_WIRE = ALL - {MeshError} - _subclasses(ConfigError)


def test_every_error_that_crosses_the_wire_is_found_by_its_reason() -> None:
    assert set(BY_REASON.values()) == ON_THE_WIRE


def test_reasons_are_distinct_and_upper_snake_case() -> None:
    reasons = Counter(kind.reason for kind in ON_THE_WIRE)

    assert [reason for reason, count in reasons.items() if count > 1] == []
    assert [reason for reason in reasons if not re.fullmatch(r"[A-Z]+(_[A-Z]+)*", reason)] == []


@pytest.mark.parametrize("kind", sorted(ON_THE_WIRE, key=lambda kind: kind.__name__))
def test_an_error_is_the_same_on_the_other_side(kind: type[MeshError]) -> None:
    sent = kind("what was wrong", field="layer", retry_after_s=0.5)

    received = from_wire(sent.code, sent.reason, sent.message, sent.field, sent.retry_after_s)

    assert type(received) is kind
    assert vars(received) == vars(sent)


def test_the_tree_at_the_top_of_the_module_shows_every_error() -> None:
    drawn = re.findall(r"\b\w+Error\b", errors.__doc__ or "")

    assert sorted(drawn) == sorted(kind.__name__ for kind in ALL)


def test_the_protocol_page_has_one_row_for_each_reason_with_its_status(root: Path) -> None:
    page = (root / "docs/protocol.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]

    for reason, kind in BY_REASON.items():
        about = [row for row in rows if f"`{reason}`" in row]
        assert about, f"docs/protocol.md has no row for {reason}"
        assert all(f"`{kind.code.name}`" in row for row in about), about


def test_protos_name_no_reason_and_no_status_that_does_not_exist(root: Path) -> None:
    text = "\n".join(path.read_text() for path in (root / "protos/expertmesh/v1").iterdir())
    comments = "\n".join(re.findall(r"//(.*)", text))
    values = set(re.findall(r"^\s*([A-Z0-9_]+) = \d+;", text, re.MULTILINE))
    codes = {code.name for code in grpc.StatusCode}

    named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", comments))
    assert named - values - codes - set(BY_REASON) - OTHER_WORDS == set()


def test_an_error_that_is_raised_anew_keeps_all_that_it_says(root: Path) -> None:
    """`type(error)(...)` names what it keeps, and forgets the rest; `error.again()` does not."""
    folders = ("expertmesh", "router_service", "expert_service", "load_controller", "fleet")
    copies = [
        f"{path.relative_to(root)}:{node.lineno}"
        for folder in folders
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _is_type_of_an_error(node.func)
    ]

    assert copies == []


def _is_type_of_an_error(made: ast.expr) -> bool:
    """Whether it reads `type(error)`, by any name but those that other things have."""
    return (
        isinstance(made, ast.Call)
        and isinstance(made.func, ast.Name)
        and made.func.id == "type"
        and isinstance(made.args[0], ast.Name)
        and made.args[0].id not in NO_ERRORS
    )
