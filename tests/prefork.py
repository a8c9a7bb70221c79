"""Processes of a service forked from one that has imported it already: up in milliseconds.

Importing torch takes two seconds; a test that kills a real process fifty times cannot pay that each
time. What runs in the fork is the module's own `main`, as `python -m MODULE` runs it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

_STOP_S = 20.0


class Prefork:
    """The process to fork from. Imports only: neither gRPC nor torch has started a thread."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.prefork", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("IMPORTED")

    def start(self, *arguments: str) -> Forked:
        """A new process of the service that has said where it listens."""
        self._ask({"start": arguments})
        pid = int(self._expect("PID"))
        return Forked(self, pid, self._expect("LISTENING"))

    def reap(self, pid: int) -> int:
        """Waits for a child's end; the signal that ended it, 0 for none."""
        self._ask({"reap": pid})
        return int(self._expect("ENDED"))

    def _ask(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)

    def _expect(self, word: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        found, _, rest = line.partition(" ")
        if found != word:
            raise AssertionError(f"the service said {line!r}, expected {word}")
        return rest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(_STOP_S)
        self._process.stdout.close()


class Forked:
    """One running process of the service."""

    def __init__(self, parent: Prefork, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address
        self._parent = parent

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._parent.reap(self.pid) == signal.SIGKILL


def _serve(module: str) -> None:
    """The template's loop, until its input ends."""
    main = importlib.import_module(f"{module}.__main__").main
    print("IMPORTED", flush=True)
    children: set[int] = set()
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if pid == 0:
                print("PID", os.getpid(), flush=True)
                os._exit(main(command["start"]))
            children.add(pid)
        else:
            _, code = os.waitpid(command["reap"], 0)
            children.discard(command["reap"])
            print("ENDED", os.WTERMSIG(code) if os.WIFSIGNALED(code) else 0, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve(sys.argv[1])
