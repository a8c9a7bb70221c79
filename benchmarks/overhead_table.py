"""Writes the measured table of docs/overhead.md from the newest results of bench_path.py.

python benchmarks/overhead_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

_ROOT = Path(__file__).parents[1]
PAGE = _ROOT / "docs" / "overhead.md"
_GRPC = "grpc p50 ms"
_BEGIN, _END = "<!-- begin: benchmarks/overhead_table.py -->\n", "<!-- end -->"


def newest_results(folder: Path = _ROOT / "benchmarks" / "results") -> Path:
    """The JSON of the last month in which the path was measured; of several, the last by name.

    Of those that have every column: runs from before data connections have none of gRPC alone.
    """
    whole = [path for path in folder.glob("path_*.json") if _GRPC in path.read_text()]
    return max(whole, key=lambda path: path.stem.split("_")[::-1])


def table(results: Path) -> str:
    """One row for each case, in Markdown."""
    whole = json.loads(results.read_text())
    lines = [
        "| case | a layer, p50 ms | p99 ms | over gRPC alone, p50 ms | bare gRPC streams, p50 ms | "
        "requests/s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['mesh p50 ms']} | {row['mesh p99 ms']} | {row[_GRPC]} | "
        f"{row['echo p50 ms']} | {row['mesh requests/s']} |"
        for row in whole["rows"]
    ]
    facts = whole["facts"]
    source = f"[{results.stem}](../benchmarks/results/{results.stem}.md)"
    lines += ["", f"{source}: {facts['cores']} cores of {facts['cpu']}, {facts['commit']}."]
    return "\n".join(lines) + "\n"


def with_table(page: str, rows: str) -> str:
    """The page with what stands between its marks replaced."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{rows}{_END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), table(newest_results())))
