"""The text to learn: the source of Python's own standard library, one stream of bytes per split.

Every machine with Python has it. Files come in sorted order and a file is held out by the hash of
its path, so a split depends on the Python version and on nothing else.
"""

import hashlib
import sysconfig
from pathlib import Path

import torch

from examples.tiny_deepseek.bytes_text import SEPARATOR

CONTEXT = 256  # bytes that the model sees at once, in training and in evaluation
# Tests and other people's packages are not the library; code pages and documentation dumps are
# tables and prose in .py files, and would flatter or blur a score that is meant to be about code.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
    | {"encodings", "pydoc_data"}
)
_SKIPPED_PREFIX = "_sysconfigdata"  # written by the build of this very interpreter
_HELD_OUT_OF_256 = 13  # about 5 % of the files


def stdlib_files() -> list[Path]:
    """Return the standard library's source files, relative to its folder, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path
        for path in found
        if not _SKIPPED_FOLDERS & set(path.parts) and not path.name.startswith(_SKIPPED_PREFIX)
    )


def is_held_out(path: Path) -> bool:
    """Say whether a file is held out: by the first byte of the SHA-256 of its path."""
    return hashlib.sha256(path.as_posix().encode()).digest()[0] < _HELD_OUT_OF_256


def load(held_out: bool) -> torch.Tensor:
    """Return one split as uint8 `[N]`: every file preceded by the separator."""
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = [path for path in stdlib_files() if is_held_out(path) == held_out]
    stream = b"".join(bytes([SEPARATOR]) + (root / path).read_bytes() for path in chosen)
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def windows(stream: torch.Tensor, context: int = CONTEXT) -> torch.Tensor:
    """Cut a stream into int64 `[W, context + 1]`: inputs are `[:, :-1]`, targets are `[:, 1:]`.

    Neighbours share one byte, so each byte is predicted exactly once, from at most `context` bytes
    before it (as few as one, where a window begins). The last incomplete window is left out.
    """
    return stream.unfold(0, context + 1, context).long()
