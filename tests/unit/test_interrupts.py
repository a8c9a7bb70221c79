"""Signals to a command that starts a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: From here `interrupts` is imported without its package, which imports Ray and torch for seconds.
_FOLDER = Path(__file__).parents[2] / "fleet" / "cli"

_SWALLOWED = """
import os, signal
from interrupts import Interrupts

class Library:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})

interrupts = Interrupts()
interrupts.check()
Library()
print("swallowed", flush=True)
try:
    interrupts.check()
except KeyboardInterrupt:
    print("raised again", flush=True)
interrupts.hold()
os.kill(os.getpid(), signal.{name})
interrupts.wait()
os.kill(os.getpid(), signal.{name})
print("ended", flush=True)
"""


def _run(name: str) -> subprocess.CompletedProcess[str]:
    return _python(_SWALLOWED.format(name=name))


def _python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(_FOLDER)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_signal_that_python_swallows_in_a_destructor_is_raised_by_the_next_check() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        ran = _run(name)

        assert ran.stdout.split("\n") == ["swallowed", "raised again", "ended", ""]
        assert "KeyboardInterrupt" in ran.stderr, "the first one was lost in the destructor"
        assert ran.returncode == 0


_HUNG_UP = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` leaves it
from interrupts import Interrupts

interrupts = Interrupts()
os.kill(os.getpid(), signal.SIGHUP)
interrupts.check()
print("goes on", flush=True)
"""


def test_a_command_under_nohup_goes_on_when_its_terminal_is_closed() -> None:
    ran = _python(_HUNG_UP)

    assert (ran.returncode, ran.stdout) == (0, "goes on\n"), ran.stderr


_SERVE = """
import os, signal
from contextlib import contextmanager
from types import SimpleNamespace
from fleet.cli import main, serve

@contextmanager
def launch(*_, **__):
    yield SimpleNamespace(address="127.0.0.1:1", endpoints=dict)
    print("closed", flush=True)

def emit(text):
    print(text, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

serve.launch, serve.emit = launch, emit
raise SystemExit(main(["serve", "checkpoint"]))
"""


@pytest.mark.slow
def test_a_signal_that_comes_with_ready_ends_the_cluster_as_any_later_one_does() -> None:
    ran = subprocess.run([sys.executable, "-c", _SERVE], capture_output=True, text=True, timeout=60)

    assert ran.returncode == 0, ran.stderr
    assert "READY 127.0.0.1:1" in ran.stderr
    assert "closed" in ran.stderr
