"""What happens to memory that messages freed, in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")

# As an echo of 1 MiB allocates: a few copies of a message, all gone before the next one.
_FAULTS = """
import resource, sys
from expertmesh.rpc.heap import keep_freed_memory

def messages(count):
    for _ in range(count):
        copies = [bytearray(1 << 20) for _ in range(8)]

if "keep" in sys.argv:
    assert keep_freed_memory()
messages(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
messages(50)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_SET = "from expertmesh.rpc.heap import keep_freed_memory; print(keep_freed_memory())"


def _run(script: str, *arguments: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return ran.stdout.strip()


@pytest.mark.slow
def test_memory_that_a_message_freed_is_not_faulted_in_again_for_the_next() -> None:
    pages = 50 * 8 * (1 << 20) // os.sysconf("SC_PAGE_SIZE")

    faults = int(_run(_FAULTS, "keep"))

    assert faults < pages // 100
    assert int(_run(_FAULTS)) > pages // 2, "this C library keeps memory by itself"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
@pytest.mark.slow
def test_who_sets_the_c_library_up_decides(name: str) -> None:
    assert _run(_SET, **{name: "131072"}) == "False"
