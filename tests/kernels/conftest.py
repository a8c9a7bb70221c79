"""Tests marked `gpu` run where there is a CUDA device, and are skipped elsewhere."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu_tests_need_a_gpu(request: pytest.FixtureRequest) -> None:
    """Skips tests marked `gpu` where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
