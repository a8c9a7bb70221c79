"""The backend that computes nothing: what benchmarks of the path rely on."""

from __future__ import annotations

import pytest
import torch

from expert_service.kernels.noop import NoopBackend
from expertmesh.dispatch import partial_dtype
from tests.kernels.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 32, 33, 1000])
def test_a_row_comes_back_times_the_sum_of_its_weights(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 64, generator=generator).to(dtype)
    ids = torch.randint(-1, 6, (rows, 4), generator=generator, dtype=torch.int32)
    weights = torch.rand(rows, 4, generator=generator)

    out = NoopBackend().compute(0, hidden, ids, weights)

    total = weights.masked_fill(ids < 0, 0.0).sum(dim=1, keepdim=True)
    assert_close(out, (hidden.float() * total).to(partial_dtype(dtype)), dtype)
