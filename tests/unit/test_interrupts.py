"""Signals to a command that starts a cluster."""

from __future__ import annotations

import subprocess
import sys

_SWALLOWED = """
import os, signal
from fleet.cli.interrupts import Interrupts

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
interrupts.wait()
os.kill(os.getpid(), signal.{name})
print("ended", flush=True)
"""


def _run(name: str) -> subprocess.CompletedProcess[str]:
    script = _SWALLOWED.format(name=name)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
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
from fleet.cli.interrupts import Interrupts

interrupts = Interrupts()
os.kill(os.getpid(), signal.SIGHUP)
interrupts.check()
print("goes on", flush=True)
"""


def test_a_command_under_nohup_goes_on_when_its_terminal_is_closed() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _HUNG_UP], capture_output=True, text=True, timeout=60
    )

    assert (ran.returncode, ran.stdout) == (0, "goes on\n"), ran.stderr
