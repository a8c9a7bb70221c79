"""Huge pages: only whole ones, content untouched, and nothing lost where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expert_service.kernels.cpu import huge_pages

MIB = 1 << 20


@pytest.mark.parametrize(
    ("address", "size", "expected"),
    [
        (0, 2 * MIB, (0, 2 * MIB)),
        (64, 2 * MIB, (2 * MIB, 2 * MIB)),
        (64, 6 * MIB, (2 * MIB, 6 * MIB)),
        (2 * MIB + 64, 64, (4 * MIB, 2 * MIB)),
    ],
)
def test_only_whole_pages_within_the_memory_are_asked_for(
    address: int, size: int, expected: tuple[int, int]
) -> None:
    assert huge_pages.whole_pages(address, size) == expected


def test_content_stays() -> None:
    memory = torch.arange(2 * MIB, dtype=torch.int64)  # 16 MiB

    huge_pages.use_huge_pages(memory.data_ptr(), memory.nbytes)

    assert torch.equal(memory, torch.arange(2 * MIB, dtype=torch.int64))


def test_small_memory_is_left_alone() -> None:
    memory = torch.zeros(100)

    assert not huge_pages.use_huge_pages(memory.data_ptr(), memory.nbytes)


@pytest.mark.parametrize("said", ["always madvise [never]", None])
def test_a_system_without_huge_pages_goes_without(
    said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled = tmp_path / "enabled"
    if said is not None:
        enabled.write_text(said)
    monkeypatch.setattr(huge_pages, "_ENABLED", enabled)
    huge_pages._are_allowed.cache_clear()
    memory = torch.zeros(2 * MIB)

    used = huge_pages.use_huge_pages(memory.data_ptr(), memory.nbytes)

    huge_pages._are_allowed.cache_clear()
    assert not used
