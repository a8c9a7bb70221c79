"""A client in a process forked from one that used expertmesh is told so, and does not hang."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.mesh import local_mesh

_SCRIPT = """
import asyncio, os, signal, sys, time
import torch
import expertmesh

address, in_parent, in_child = sys.argv[1:]
hidden = torch.zeros(2, 64)

async def once():
    async with expertmesh.connect_async(address, timeout=5) as mesh:
        await mesh.forward(hidden, 1)

def blocking():
    expertmesh.connect(address, timeout=5).close()

def fork(child):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # nothing else would end a child that hangs
        started = time.monotonic()
        try:
            child()
        except expertmesh.ConfigError as error:
            soon = time.monotonic() - started < 2.0
            print("told" if soon and "spawn" in error.message else "late", flush=True)
        os._exit(0)
    print("ended", os.waitpid(pid, 0)[1], flush=True)
    os._exit(0)

if in_parent == "connect":
    mesh = expertmesh.connect(address, timeout=5)
    mesh.forward(hidden, 1)
else:
    asyncio.run(once())
    mesh = None
fork({
    "connect": blocking,
    "connect_async": lambda: asyncio.run(once()),
    "the parent's": lambda: mesh.forward(hidden, 1),
    "the parent's, asyncio": lambda: asyncio.run(mesh._mesh.forward(hidden, 1)),
}[in_child])
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    with local_mesh(path, shards=1) as mesh:
        yield mesh.address


@pytest.mark.parametrize(
    ("in_parent", "in_child"),
    [
        ("connect", "connect"),
        ("connect", "connect_async"),
        ("connect", "the parent's"),
        ("connect", "the parent's, asyncio"),
        ("connect_async", "connect"),
        ("connect_async", "connect_async"),
    ],
)
def test_a_forked_client_is_told_at_once_to_spawn(
    address: str, in_parent: str, in_child: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, address, in_parent, in_child],
        capture_output=True,
        text=True,
        timeout=120.0,
        check=True,
        cwd=Path(__file__).parents[2],
    )

    assert done.stdout.split() == ["told", "ended", "0"]
    assert "never awaited" not in done.stderr
