"""What the tests of the repository itself share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return _ROOT


@pytest.fixture(scope="session")
def protoc() -> Callable[..., None]:
    """Compiles every proto with the generator that `make proto` uses."""
    python = _ROOT / ".proto-venv/bin/python"
    if not python.exists():
        pytest.skip("no .proto-venv: `make test` and `make proto` make it")

    def compile_protos(*outputs: str) -> None:
        protos = [str(path.relative_to(_ROOT)) for path in _ROOT.glob("protos/expertmesh/v1/*")]
        command = [str(python), "-m", "grpc_tools.protoc", "-I", "protos", *outputs, *protos]
        subprocess.run(command, cwd=_ROOT, check=True)

    return compile_protos
