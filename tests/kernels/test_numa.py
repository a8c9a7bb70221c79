"""Which NUMA node a server takes, and that pinning holds for the thread and those it starts."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from expert_service.kernels.cpu.numa import choose_node, parse_cpus, pin_this_thread, usable_nodes
from expertmesh.errors import ConfigError

TWO = {0: {0, 1}, 2: {4, 5}}


@pytest.mark.parametrize(
    ("numa", "server_id", "expected"),
    [
        ("off", "shard1-replica0", None),
        ("auto", "shard0-replica0", 0),
        ("auto", "shard1-replica0", 2),
        ("auto", "shard1-replica1", 0),
        ("auto", "a server", 0),
        ("2", "shard0", 2),
    ],
)
def test_servers_spread_over_the_nodes(numa: str, server_id: str, expected: int | None) -> None:
    assert choose_node(numa, server_id, TWO) == expected


@pytest.mark.parametrize("nodes", [{}, {0: {0, 1}}], ids=["none", "one"])
def test_where_there_is_one_node_nothing_is_pinned(nodes: dict[int, set[int]]) -> None:
    assert choose_node("auto", "shard1-replica0", nodes) is None


@pytest.mark.parametrize("numa", ["1", "on", "-1", ""])
def test_a_node_that_is_not_there_is_refused(numa: str) -> None:
    with pytest.raises(ConfigError, match="numa is"):
        choose_node(numa, "shard0", TWO)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5\n", {5}), ("\n", set())],
)
def test_the_systems_lists_of_cpus_are_read(text: str, expected: set[int]) -> None:
    assert parse_cpus(text) == expected


def test_only_nodes_with_cpus_that_this_process_may_use_count(tmp_path: Path) -> None:
    mine = min(os.sched_getaffinity(0))
    for node, cpus in ((0, f"{mine}"), (1, "4000-4003"), (2, "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")

    assert usable_nodes(tmp_path) == {0: {mine}}


def test_a_pinned_thread_pins_those_it_starts_and_nobody_else() -> None:
    before, seen = os.sched_getaffinity(0), []

    def work() -> None:
        pin_this_thread({min(before)})
        helper = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        helper.start()
        helper.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [{min(before)}]
    assert os.sched_getaffinity(0) == before
