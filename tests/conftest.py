"""What every test runs under, and what none may leave behind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

# Before any import below, and inherited by every process that a test starts.
os.environ["RAY_AUTH_MODE"] = "disabled"  # else a fresh cluster asks for a token that peers lack
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # every checkpoint is a local directory
_SESSION = os.environ["EXPERTMESH_TEST_SESSION"] = uuid.uuid4().hex

import hypothesis
import psutil
import pytest
import torch

from expertmesh.rpc import engine  # before any test imports grpc
from expertmesh.rpc.process import keep_what_is_loaded

# Else a part of what Ray forks from this process dies before it is what it was to be.
assert engine.APPLIED, "somebody imported grpc before expertmesh.rpc.engine"

if not torch.cuda.is_available():
    # Triton reads it when a kernel's module is imported; without a GPU nothing else runs a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(2)  # sums in the same order on every machine, and cores left for the servers

# For `make mutants`: the same examples every time, and none made smaller, which nobody reads there.
hypothesis.settings.register_profile(
    "mutants",
    database=None,
    deadline=None,
    derandomize=True,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)

_EXIT_S = 10.0  # how long a process that was told to stop may take
# Python's own helper of shared memory and spawn lives as long as the process that needed it.
_HELPER = "multiprocessing.resource_tracker"


def pytest_collection_finish() -> None:
    """Every module is loaded: a full collection need not look at them again, which takes half a
    second, in the middle of a test that compares times."""
    keep_what_is_loaded()


@pytest.fixture(autouse=True)
def gpu_tests_need_a_gpu(request: pytest.FixtureRequest) -> None:
    """Skips tests marked `gpu` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    """Fails the session when a process that a test started outlives it."""
    yield
    _, running = psutil.wait_procs(_started_here(), timeout=_EXIT_S)
    left = [command for process in running if (command := _command(process))]
    for process in running:
        process.kill()
    assert not left, "processes left running:\n" + "\n".join(left)


def _started_here() -> list[psutil.Process]:
    """Our descendants, and orphans that carry this session's mark in their environment."""
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        try:
            if process.environ().get("EXPERTMESH_TEST_SESSION") == _SESSION:
                found.add(process)
        except psutil.Error:  # it has ended, or is not ours to read
            continue
    found.discard(psutil.Process())
    return [process for process in found if _HELPER not in _command(process)]


def _command(process: psutil.Process) -> str:
    """The command line of a process, empty when it has ended."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return f"{process.pid} {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:
        return ""
