"""gRPC does not survive a fork: says so, where a call in the child would only hang.

Its threads are gone in the child, and its locks and sockets are the parent's. Not even a timeout
ends such a call, for the poller that would notice it is gone as well.
"""

from __future__ import annotations

import os

from expertmesh.errors import ConfigError

_pid = 0  # of the process in which gRPC was first used; a child inherits it


def use_grpc() -> None:
    """Called by whatever is about to use gRPC. Raises ConfigError in a child of a process that
    has."""
    global _pid
    if _pid not in (0, os.getpid()):
        raise ConfigError(
            "this process was forked from one that used expertmesh, and gRPC does not survive a "
            "fork: start processes with the spawn method"
        )
    _pid = os.getpid()
