"""Prompt mixes that lean on some experts of the example model: bytes that every Python brings."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from examples.tiny_deepseek import corpus
from examples.tiny_deepseek.bytes_text import SEPARATOR

_LEAST_CODES = 50  # of a code page: below it, the file is a codec with code of its own


def _stream(files: list[Path]) -> torch.Tensor:
    content = b"".join(bytes([SEPARATOR]) + path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _code_pages() -> torch.Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"]) / "encodings"
    files = sorted(folder.glob("*.py"))
    return _stream([path for path in files if path.read_bytes().count(b"0x") > _LEAST_CODES])


def _prose() -> torch.Tensor:
    return _stream([Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"])


def _tenants() -> torch.Tensor:
    """As many bytes of the one as of the other: one delta has to suit both."""
    prose = _prose()
    return torch.cat([prose, _code_pages()[: len(prose)]])


#: By name, uint8 `[N]`. Nothing of the first three was trained on: `corpus` leaves those folders
#: out.
MIXES: dict[str, Callable[[], torch.Tensor]] = {
    "code-pages": _code_pages,
    "prose": _prose,
    "tenants": _tenants,
    "held-out": lambda: corpus.load(held_out=True),
}


def draw(mix: str, windows: int, seed: int) -> torch.Tensor:
    """That many windows of a mix, int64 `[W, CONTEXT + 1]`, none twice, in an order by the seed."""
    pieces = corpus.windows(MIXES[mix]())
    if len(pieces) < windows:
        raise ValueError(f"{mix} has {len(pieces)} windows, expected at least {windows}")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return pieces[order[:windows]]
