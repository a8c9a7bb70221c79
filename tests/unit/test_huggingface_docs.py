"""docs/huggingface.md claims what a test holds."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs/huggingface.md").read_text()
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*/test_huggingface*.py"))
    named = re.findall(r"`(test_\w+)`", page)

    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []
