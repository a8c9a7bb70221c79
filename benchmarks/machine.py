"""On what a benchmark ran: commit, machine, versions. No host name, no path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "grpcio", "ray", "transformers", "numpy")
_FLAGS = ("avx512f", "avx512_bf16", "amx_bf16")


def facts() -> dict[str, object]:
    """Facts by name, in the order in which a page shows them."""
    cpu = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    model = re.search(r"model name\s*: (.*)", cpu)
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": " ".join(flag for flag in _FLAGS if re.search(rf"\b{flag}\b", cpu)),
        "memory GiB": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30,
        "load average before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def version(package: str) -> str:
    """Of an installed package; a GPU machine may have no Ray."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
