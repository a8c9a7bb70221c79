"""The benchmark of the expert kernels: its rehearsal, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_only_a_rehearsal_runs() -> None:
    done = _run("benchmarks/kernels.py", environment={"CUDA_VISIBLE_DEVICES": ""})

    assert done.returncode == 2
    assert "no CUDA device: use --rehearse" in done.stderr


def test_a_rehearsal_checks_every_side_and_times_nothing(tmp_path: Path) -> None:
    results = tmp_path / "times.json"

    done = _run(
        "benchmarks/kernels.py", "--rehearse", "--tokens", "5", "--shards", "more",
        "--budget-s", "0", "--hardware", "nobodys", "--json", str(results),
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    assert [row["case"] for row in found["rows"]] == [
        "more experts fp16 T=5",
        "more experts w8a16 T=5",
        "more experts w8a8 T=5",
    ]
    assert found["rows"][0]["sides"] == "ours, torch grouped_mm, hf grouped_mm, hf batched_mm"
    assert found["times_us"] == {}
    assert found["failures"] == []
    assert not list((ROOT / "benchmarks/results").glob("kernels_nobodys*"))


_WITH_MADE_UP_TIMES = """
    import sys
    sys.argv = ["kernels.py", "--rehearse", "--tokens", "5", "--shards", "more", "--budget-s", "0"]
    sys.path.insert(0, "benchmarks")
    import kernels

    class MadeUp:
        def __init__(self, rounds):
            self.names, self.notes = [], {"hf grouped_mm graph": "not captured"}
        def add_eager(self, name, calls):
            self.names.append(name)
        def add_graph(self, name, calls):
            if name not in self.notes:
                self.names.append(name)
        def medians_us(self):
            return {name: 10.0 if name.startswith("ours") else 30.0 for name in self.names}

    others = kernels._others
    kernels._others = lambda *given: {
        name: kernels.in_bfloat16(side) for name, side in others(*given).items()
    }
    kernels.Sides = MadeUp
    kernels._compile = lambda *given: None
    kernels.Bench.rehearsing = False
    kernels.Bench.chip = kernels.Chip(1e12, 100e12)
    kernels.torch.bfloat16 = kernels.torch.float16
    kernels.torch.cuda.get_device_name = lambda: ""
    kernels.SHARDS = kernels.TINY_SHARDS
    sys.exit(kernels.main())
"""


def test_the_table_shows_floor_requirement_and_peers() -> None:
    code = textwrap.dedent(_WITH_MADE_UP_TIMES)

    done = _run("-c", code, environment={"CUDA_VISIBLE_DEVICES": ""})

    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    table = {row[0].removeprefix("| "): dict(zip(lines[0], row, strict=True)) for row in lines}
    first = table["more experts bf16 T=5"]
    assert (first["graph"], first["eager"], first["holds"]) == ("10.0", "10.0", "–")
    assert first["best peer"] == "torch grouped_mm 30.0"
    assert (first["x peer"], first["x grouped_mm"]) == ("3.00", "3.00")


def _run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
