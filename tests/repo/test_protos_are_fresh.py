"""The generated code in the repository is what `make proto` would write now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_the_committed_code_is_what_the_protos_generate(
    root: Path, tmp_path: Path, protoc: Callable[..., None]
) -> None:
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")

    fresh = _generated(tmp_path)
    committed = _generated(root)
    assert committed.keys() == fresh.keys()
    assert [name for name in fresh if committed[name] != fresh[name]] == [], "run `make proto`"


def _generated(top: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in top.glob("expertmesh/v1/*_pb2*.py*")}
