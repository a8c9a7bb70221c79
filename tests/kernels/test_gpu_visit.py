"""The script of a GPU visit: rehearsed on the CPU, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from scripts.gpu_visit_report import facts, table

ROOT = Path(__file__).parents[2]
VISIT = "scripts/gpu_visit.sh"


def _visit(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Leaves the archive's content beside it."""
    done = subprocess.run(
        ["bash", VISIT, *arguments],
        cwd=ROOT,
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    if (out / "visit.tar.gz").exists():
        with tarfile.open(out / "visit.tar.gz") as archive:
            archive.extractall(out, filter="data")
    return done


def test_a_rehearsal_goes_through_every_step_without_ray(tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/ray.py").write_text("raise ImportError('there is no Ray here')")

    done = _visit(tmp_path, "--rehearse", "--quick", PYTHONPATH=str(tmp_path / "absent"))

    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == [
        "facts",
        "tests",
        "kernels",
        "servers",
    ]
    assert "ok server example float32: error " in done.stdout
    assert json.loads((tmp_path / "visit/kernels.json").read_text())["times_us"] == {}
    assert all(
        outcome["is_right"] for outcome in json.loads((tmp_path / "visit/servers.json").read_text())
    )


def test_a_step_that_fails_stops_no_other_and_is_told_at_the_end(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ "$*" == *_report.py* ]] && exec {sys.executable} "$@"\n'
        'echo "this step cannot run"\nexit 3\n'
    )
    python.chmod(0o755)

    done = _visit(tmp_path / "out", "--rehearse", "--quick", PYTHON=str(python))

    assert done.returncode == 1
    assert [line.split()[2] for line in done.stdout.splitlines()[-4:]] == ["s"] * 4
    assert [line.split()[3] for line in done.stdout.splitlines()[-4:]] == [
        "ok",
        "FAILED",
        "FAILED",
        "FAILED",
    ]
    for step in ("tests", "kernels", "servers"):
        assert f"--- end of {step}.log\nthis step cannot run\n" in done.stdout


@pytest.mark.parametrize("arguments", [["--fast"], ["--quick"]], ids=["unknown", "alone"])
def test_a_wrong_argument_is_refused(arguments: list[str], tmp_path: Path) -> None:
    done = _visit(tmp_path, *arguments)

    assert done.returncode == 2
    assert "--rehearse" in done.stderr


def test_the_limits_of_a_visit_add_up_to_nine_minutes() -> None:
    script = (ROOT / VISIT).read_text()
    limits = {
        (words[1], words[2])
        for line in script.splitlines()
        if (words := line.split()) and words[0] == "step" and "rehearse" not in line
    }
    common = [("wheels", "40"), ("facts", "40"), ("servers", "80")]

    plain = [*common, ("tests", "170"), ("kernels", "200")]
    tuning = [*common, ("tests", "80"), ("tune", "240"), ("kernels", "60")]

    assert {*plain, *tuning} <= limits
    assert sum(int(limit) for _, limit in plain) <= 540
    assert sum(int(limit) for _, limit in tuning) <= 540


def test_the_table_ends_with_how_each_step_went(tmp_path: Path) -> None:
    (tmp_path / "steps.tsv").write_text("facts\t0\t2\t40\nkernels\t124\t200\t200\n")
    (tmp_path / "kernels.log").write_text("\n".join(f"line {i}" for i in range(9)))
    row = {"case": "shard bf16 T=1", "floor": "164.0 memory", "must": "185", "holds": "yes"}
    whole = {"rows": [row], "failures": ["other: wrong"]}
    (tmp_path / "kernels.json").write_text(json.dumps(whole))
    outcome = {"case": "fp8", "failure": "did not start\nlog", "error": 0.0, "is_right": False}
    (tmp_path / "servers.json").write_text(json.dumps([outcome]))

    assert list(table(tmp_path)) == [
        "--- end of kernels.log",
        *(f"line {i}" for i in range(3, 9)),
        "",
        "shard bf16 T=1: floor 164.0 memory, must 185, holds yes",
        "WRONG other: wrong",
        "WRONG server fp8: did not start",
        "",
        "facts         2 s  ok",
        "kernels     200 s  TIMED OUT after 200 s",
    ]


def test_facts_name_versions_and_not_the_machine() -> None:
    found = facts()

    assert found["triton"] != "not installed"
    assert os.uname().nodename not in json.dumps(found)
