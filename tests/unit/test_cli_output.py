"""What commands print, where the terminal knows few characters, or nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from expertmesh.v1 import router_pb2
from fleet.cli import demo_report, status
from fleet.cli.output import server_json
from fleet.demo import DemoResult, Generation, Kill

_TIMEOUT_S = 120.0
_SHOWN = """
import sys
from rich.console import Console
from rich.table import Table
from expertmesh.v1 import router_pb2
from fleet.cli import demo_report
from fleet.cli.output import can_show, emit, loading_bars, prepare_output

prepare_output()
emit(f"{can_show(demo_report.BARS)} {can_show(demo_report.ASCII_BARS)}")
emit(demo_report.BARS + " caf\\u00e9")
table = Table("a long name that does not fit")
table.add_column("another that does not fit", no_wrap=True)
Console(file=sys.__stdout__, width=12).print(table)
server = router_pb2.ServerStatus(server_id="caf\\u00e9", node="n", total_bytes=4, loaded_bytes=2)
with loading_bars(quiet=False, check=lambda: None) as show:
    show(router_pb2.GetStatusResponse(servers=[server]))
emit("end")
"""
_MANY = """
from fleet.cli.output import emit, prepare_output

prepare_output()
for _ in range(100_000):
    emit("a line")
"""


def _python(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=_TIMEOUT_S, check=False,
        env={**os.environ, "PYTHONCOERCECLOCALE": "0", **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1", "TTY_COMPATIBLE": "1", "FORCE_COLOR": "1"},
    ],
    ids=["ascii", "locale", "latin-1, as on a terminal"],
)
@pytest.mark.slow
def test_what_a_terminal_has_no_code_for_ends_no_command(environment: dict[str, str]) -> None:
    ran = _python(_SHOWN, **environment)

    lines = ran.stdout.split(b"\n")
    assert (ran.returncode, lines[0], lines[-2]) == (0, b"False True", b"end"), ran.stderr
    assert lines[1].startswith(b" ???????? caf")
    assert b"Traceback" not in ran.stderr


@pytest.mark.slow
def test_bars_are_shown_where_they_can_be() -> None:
    ran = _python(_SHOWN, PYTHONIOENCODING="utf-8")

    assert ran.stdout.decode().split("\n")[:2] == ["True True", demo_report.BARS + " café"]


def _result() -> DemoResult:
    generation = Generation("text", [0.001, 0.002])
    return DemoResult(
        prompt="p", ready_s=1.0, reference=generation, remote=generation,
        kill=Kill("s", 1, 1, generation, 0), rpcs=1, ffn_layers=1, forward_passes=1, rpc_ms=1.0,
        counts={1: [0, 4, 8]}, maxvio={1: 1.0}, client_parameters=1, model_parameters=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bars", "shown"), [(demo_report.BARS, "| ▄█|"), (demo_report.ASCII_BARS, "| =%|")]
)
def test_the_load_is_drawn_with_the_characters_that_there_are(bars: str, shown: str) -> None:
    report = demo_report.render(_result(), 80, bars)

    assert shown in report
    assert len(demo_report.BARS) == len(demo_report.ASCII_BARS)
    assert demo_report.ASCII_BARS.isascii()


@pytest.mark.parametrize("width", [0, 1])
def test_a_terminal_without_width_gets_a_report(width: int) -> None:
    assert "| ▄█|" in demo_report.render(_result(), width)


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_no_command_and_is_not_complained_of() -> None:
    """`expertmesh status | head -1`."""
    with subprocess.Popen(
        [sys.executable, "-c", _MANY], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.readline() == b"a line\n"
        writer.stdout.close()
        said = writer.stderr.read()

    assert (writer.returncode, said) == (0, b"")


@pytest.mark.slow
def test_a_command_without_standard_output_does_its_work() -> None:
    command = f"exec {sys.executable} -c 'from fleet.cli.output import *; prepare_output(); " \
              "emit(\"a\")' >&-"  # fmt: skip
    ran = subprocess.run(
        ["sh", "-c", command], stderr=subprocess.PIPE, timeout=_TIMEOUT_S, check=False
    )

    assert (ran.returncode, ran.stderr) == (0, b"")


def test_who_is_left_out_is_told_to_people_and_programs() -> None:
    servers = [
        router_pb2.ServerStatus(server_id=name, connected=True, suspected=name == "silent")
        for name in ("silent", "well")
    ]

    lines = status._lines("router:1", router_pb2.GetStatusResponse(servers=servers), "olmoe", 4)

    assert [server_json(server)["suspected"] for server in servers] == [True, False]
    (at,) = [at for at, line in enumerate(lines) if "left out: it was silent" in line]
    assert lines[at - 1].startswith("silent ")
