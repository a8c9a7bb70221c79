"""The path of two checkouts in turn: what a change gains or costs, on a machine that is never calm.

git worktree add --detach ../before HEAD~1
python benchmarks/compare_path.py ../before [--tokens 1 64 4096] [--shared-memory auto]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# Before torch is imported: threads that wait sleep, they take no core from the servers.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
import uvloop
from harness import Spread, ratios
from layer import TINY_EXPERTS, make_block, make_rows, save_block
from services import cluster

from expertmesh.client import connect_async

_HERE = Path(__file__).resolve().parent.parent
_SHARDS = 2
_SERVE = "--serve"  # what follows is for the processes that this script starts of itself
_Sample = tuple[float, float]  # p50 in ms, CPU of all processes in ms a request


class _Side:
    """A cluster and its client, of one checkout: a process of its own, with children."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        if self._read() != "ready":
            raise RuntimeError("a cluster did not start: see above")

    def measure(self, tokens: int, requests: int) -> _Sample:
        """So many requests, one after the other."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens} {requests}\n")
        self._process.stdin.flush()
        p50, cpu = map(float, self._read().split())
        return p50, cpu

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def _side(checkout: Path, shared_memory: str) -> Iterator[_Side]:
    # This very script, with the other's modules: what is compared is the checkouts alone.
    folders = (checkout, checkout / "benchmarks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    with subprocess.Popen(
        [sys.executable, "-P", __file__, str(checkout), _SERVE, "--shared-memory", shared_memory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env=environment,
    ) as process:
        yield _Side(process)


def _compare(arguments: argparse.Namespace) -> None:
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(_side(checkout, arguments.shared_memory))
            for name, checkout in (("before", arguments.before), ("now", _HERE))
        }
        print("tokens  before ms  now ms  now/before p50, CPU: median (least–largest)")
        for tokens in arguments.tokens:
            requests = max(8, 100 if tokens <= 64 else 8000 // tokens)
            for side in sides.values():
                side.measure(tokens, requests)
            found: dict[str, list[_Sample]] = {name: [] for name in sides}
            for block in range(arguments.blocks):
                # Each is first as often as the other: who comes second finds warmer caches.
                for name in list(sides) if block % 2 == 0 else reversed(list(sides)):
                    found[name].append(sides[name].measure(tokens, requests))
            (before, before_cpu), (now, now_cpu) = (
                tuple(zip(*found[name], strict=True)) for name in ("before", "now")
            )
            medians = Spread.of(before).median, Spread.of(now).median
            print(
                f"{tokens:6} {medians[0]:10.3f} {medians[1]:7.3f}  {ratios(now, before)}, "
                f"{ratios(now_cpu, before_cpu)}",
                flush=True,
            )


async def _serve(address: str, shared_memory: str) -> None:
    processes = [os.getpid(), *_children()]
    async with connect_async(address, shared_memory=shared_memory) as mesh:  # type: ignore[arg-type]
        print("ready", flush=True)
        while line := sys.stdin.readline():
            tokens, requests = map(int, line.split())
            rows = make_rows(TINY_EXPERTS, tokens, seed=tokens)
            for _ in range(requests // 5):
                await mesh.forward(rows, 0)
            before_ns, seconds = _cpu_ns(processes), []
            for _ in range(requests):
                start = time.perf_counter()
                await mesh.forward(rows, 0)
                seconds.append(time.perf_counter() - start)
            cpu_ms = (_cpu_ns(processes) - before_ns) / requests / 1e6
            print(1e3 * Spread.of(seconds).median, cpu_ms, flush=True)


def _children() -> list[int]:
    return [
        int(child)
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def _cpu_ns(processes: list[int]) -> int:
    """Time on a core, of every thread since it started."""
    tasks = (task for pid in processes for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def main() -> None:
    """Compares; or serves one side, as a child of itself."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--shared-memory", choices=("off", "auto"), default="off")
    parser.add_argument(_SERVE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.before = arguments.before.resolve()
    if not arguments.serve:
        _compare(arguments)
        return
    torch.set_num_threads(1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        save_block(make_block(TINY_EXPERTS), Path(folder))
        with cluster(
            Path(folder),
            Path(folder),
            _SHARDS,
            backend="noop",
            shared_memory=arguments.shared_memory,
        ) as address:
            uvloop.run(_serve(address, arguments.shared_memory))


if __name__ == "__main__":
    main()
