"""What a GPU visit writes down: facts of the machine first, and a short table last.

python scripts/gpu_visit_report.py facts FILE
python scripts/gpu_visit_report.py table FOLDER
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LAST_LINES = 6  # of the log of a step that failed
_TIMED_OUT = (124, 137)
_COLUMNS = ("floor", "must", "graph", "eager", "x floor", "holds", "x peer", "x grouped_mm")
_QUERY = "name,driver_version,memory.total,memory.free,clocks.sm,clocks.mem"


def facts() -> dict[str, object]:
    """Of the GPU and of the versions. Nothing that names the machine."""
    import torch

    from benchmarks.machine import facts as of_the_machine
    from benchmarks.machine import version

    found = of_the_machine()
    found["triton"] = version("triton")
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": chip.name,
            "compute capability": f"{chip.major}.{chip.minor}",
            "multiprocessors": chip.multi_processor_count,
            "gpu memory GiB": round(chip.total_memory / 2**30, 1),
            "L2 MiB": chip.L2_cache_size >> 20,
        }
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"]
            found["nvidia-smi"] = subprocess.run(
                query, capture_output=True, text=True, check=False, timeout=20
            ).stdout.splitlines()
    return found


def table(folder: Path) -> Iterator[str]:
    """Lines: how each step went, the kernels, the servers; short enough to be read at the end."""
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    for name, code, *_ in steps:
        if code != "0":
            yield f"--- end of {name}.log"
            yield from (folder / f"{name}.log").read_text().splitlines()[-_LAST_LINES:]
    yield ""
    for row in _load(folder / "kernels.json").get("rows", []):
        cells = (f"{column} {row[column]}" for column in _COLUMNS if column in row)
        yield f"{row['case']}: {', '.join(cells) or 'right: ' + row.get('sides', '')}"
    for failure in _load(folder / "kernels.json").get("failures", []):
        yield f"WRONG {failure}"
    for outcome in _load(folder / "servers.json") or []:
        said = outcome["failure"].splitlines() or [f"error {outcome['error']:.1e}"]
        yield f"{'ok' if outcome['is_right'] else 'WRONG'} server {outcome['case']}: {said[0]}"
    yield ""
    for name, code, seconds, limit in steps:
        how = "ok" if code == "0" else f"FAILED ({code})"
        if int(code) in _TIMED_OUT:
            how = f"TIMED OUT after {limit} s"
        yield f"{name:<10} {seconds:>4} s  {how}"


def _load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def main(arguments: list[str]) -> int:
    """The exit code."""
    match arguments:
        case ["facts", path]:
            text = json.dumps(facts(), indent=1)
            Path(path).write_text(text + "\n")
            print(text)
        case ["table", folder]:
            print("\n".join(table(Path(folder))))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
