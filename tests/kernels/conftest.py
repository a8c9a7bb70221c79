"""What the tests of the Triton kernels run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
