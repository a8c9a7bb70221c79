"""Keeps a server's device thread, and with it its memory, on one NUMA node.

Linux puts memory where the thread that first writes it runs, and threads start where the one that
starts them may run: a thread that is pinned before it packs weights has them, and its helpers, on
its node for good.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from expertmesh.errors import ConfigError

_LOG = logging.getLogger(__name__)
_NODES = Path("/sys/devices/system/node")


def choose_node(numa: str, server_id: str, nodes: Mapping[int, set[int]]) -> int | None:
    """The node for a server, None for no pinning.

    `numa` is "off", "auto" or a node's number; `nodes` has the CPUs of each. "auto" spreads servers
    by the numbers in their ids ("shard3-replica1" is 4), and pins nothing where there is one node.
    Raises ConfigError for another word, and for a node that is not there.
    """
    if numa == "off":
        return None
    if numa == "auto":
        number = sum(int(digits) for digits in re.findall(r"\d+", server_id))
        return sorted(nodes)[number % len(nodes)] if len(nodes) > 1 else None
    if not numa.isdigit():
        raise ConfigError(f"numa is {numa!r}, expected off, auto or a node's number")
    if int(numa) not in nodes:
        known = ", ".join(map(str, sorted(nodes))) or "none"
        raise ConfigError(f"numa is {numa}, but this process may use nodes: {known}")
    return int(numa)


def usable_nodes(folder: Path = _NODES) -> dict[int, set[int]]:
    """CPUs of each NUMA node that this process may run on; nodes without one are left out."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    nodes = {
        int(path.parent.name.removeprefix("node")): parse_cpus(path.read_text()) & allowed
        for path in folder.glob("node[0-9]*/cpulist")
    }
    return {node: cpus for node, cpus in nodes.items() if cpus}


def parse_cpus(text: str) -> set[int]:
    """The numbers in a list such as "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def pin_this_thread(cpus: set[int]) -> None:
    """Lets the calling thread, and threads that it starts from now on, run on these CPUs only."""
    os.sched_setaffinity(0, cpus)
    _LOG.info("device thread pinned to %d CPUs of one NUMA node", len(cpus))
