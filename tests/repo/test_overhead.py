"""The page about overhead shows what was measured last."""

from __future__ import annotations

from benchmarks.overhead_table import PAGE, newest_results, table, with_table


def test_the_table_is_that_of_the_newest_results() -> None:
    page = PAGE.read_text()

    assert page == with_table(page, table(newest_results())), (
        "run: python benchmarks/overhead_table.py"
    )
