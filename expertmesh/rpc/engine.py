"""How gRPC polls its sockets; imported before `grpc` is, by everything of ours.

gRPC for Python can read sockets on the threads of its EventEngine, which hand every message to the
thread that waits for it, or on the waiting thread itself. The second way saves a wake-up a message:
bare streams over two hops took 0.53 instead of 0.71 ms (4 KiB, p50, grpcio 1.85.1 on 2 cores).
gRPC takes that from the environment, once, while it is imported; the variable is taken back
afterwards, so that processes started later do not inherit it. Whoever sets GRPC_EXPERIMENTS, or
imports grpc first, decides for themselves.
"""

from __future__ import annotations

import importlib
import os
import sys

_VARIABLE = "GRPC_EXPERIMENTS"
_POLL_WHERE_WAITED = "-event_engine_client,-event_engine_listener"

if "grpc" not in sys.modules and _VARIABLE not in os.environ:
    os.environ[_VARIABLE] = _POLL_WHERE_WAITED
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ[_VARIABLE]
