"""Processes that fail in grey: `python -m tests.grey server FOLDER ...`, `... router ...`.

A server computes nothing while FOLDER/hang exists: its device thread waits, and its event loop,
its heartbeat and its health go on. It notes in FOLDER/held that a request has met the fault. A
router has spent its budget for second askings of slow servers, from its start on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_service.__main__ import main as serve_experts
from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard
from router_service.__main__ import main as serve_router
from router_service.standing import HedgeBudget


def _hang_while(exists: Path, compute: Callable[..., Any]) -> Callable[..., Any]:
    def waiting(*arguments: Any) -> Any:
        while exists.exists():
            (exists.parent / "held").touch()
            time.sleep(0.005)
        return compute(*arguments)

    return waiting


def _server(folder: str, *arguments: str) -> int:
    ExpertShard.compute = _hang_while(Path(folder) / "hang", ExpertShard.compute)  # type: ignore[method-assign]
    # As on a GPU: nothing is computed on the event loop.
    DeviceRunner.execute_now = lambda self, request: None  # type: ignore[method-assign]
    return serve_experts(list(arguments))


def _router(*arguments: str) -> int:
    HedgeBudget.spend = lambda self: False  # type: ignore[method-assign]
    return serve_router(list(arguments))


if __name__ == "__main__":
    sys.exit({"server": _server, "router": _router}[sys.argv[1]](*sys.argv[2:]))
