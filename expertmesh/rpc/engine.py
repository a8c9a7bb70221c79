"""How gRPC polls its sockets and meets a fork; imported before `grpc` is, by everything of ours.

gRPC for Python can read sockets on the threads of its EventEngine, which hand every message to the
thread that waits for it, or on the waiting thread itself. The second way saves a wake-up a message:
bare streams over two hops took 0.53 instead of 0.71 ms (4 KiB, p50, grpcio 1.85.1 on 2 cores).

gRPC's fork support wants to go on in the child. Nobody does that here, but every process that is
started with a `preexec_fn`, as Ray starts its own, is forked first: beside a busy stream 40 of
5,100 such children were aborted by it ("epoll_wait error: Bad file descriptor") before they became
the program they were to be, and Ray then waits for a raylet that never was. Without it none of
6,100 was.

gRPC takes both from the environment, once, while it is imported; the variables are taken back
afterwards, so that processes started later do not inherit them. Whoever sets one, or imports grpc
first, decides for themselves.
"""

from __future__ import annotations

import importlib
import os
import sys

_SETTINGS = {
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}

#: Whether gRPC has these settings, and was not imported by somebody else before.
APPLIED = "grpc" not in sys.modules

if APPLIED:
    _ours = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(_ours)
    try:
        importlib.import_module("grpc")
    finally:
        for _name in _ours:
            del os.environ[_name]
