"""What servers return is rounded by a stated bound, and overflows where the sum itself does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.dispatch import combine, partial_dtype

H = 16
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@dtypes
@given(
    servers=st.integers(1, 5),
    rows=st.integers(1, 4),
    magnitude=st.floats(-6, 6),
    cancels=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_an_answer_is_off_by_one_rounding_of_itself_and_one_of_each_part(
    dtype: torch.dtype, servers: int, rows: int, magnitude: float, cancels: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = 10**magnitude * torch.randn(servers, rows, H, generator=generator)
    if cancels and servers > 1:
        parts[-1] = (1 - 2**-6) * -parts[:-1].sum(0)
    total, size = parts.double().sum(0), parts.double().abs().sum(0)

    sent = [(None, part.to(partial_dtype(dtype))) for part in parts]
    answer = combine(torch.empty(rows, H, dtype=dtype), sent)

    of_parts = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
    float32 = servers * torch.finfo(torch.float32).eps
    bound = torch.finfo(dtype).eps / 2 * total.abs() + (of_parts + float32) * size
    bound = bound * 1.01 + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    fits = total.abs() + bound < torch.finfo(dtype).max
    assert answer.dtype == dtype
    assert ((answer.double() - total).abs() <= bound)[fits].all()


def test_parts_beyond_float16_make_no_infinity_of_a_sum_within_it() -> None:
    hidden = torch.empty(1, 2, dtype=torch.float16)
    parts = [torch.tensor([[80000.0, 70000.0]]), torch.tensor([[-78000.0, 70000.0]])]

    answer = combine(hidden, [(None, part.to(partial_dtype(hidden.dtype))) for part in parts])

    assert answer.tolist() == [[2000.0, float("inf")]]
