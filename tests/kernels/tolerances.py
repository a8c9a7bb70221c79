"""How far a backend may be from the float32 reference: the one table of the kernel tests.

Relative to the largest value of a result, and never relaxed by environment.
"""

from __future__ import annotations

import torch

RELATIVE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,  # 11 bits in x, in the intermediate and in y
    torch.bfloat16: 1e-2,  # 8 bits
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Fails unless the largest difference is within the tolerance of `dtype`."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not actual.numel():
        return
    assert torch.isfinite(actual).all()
    scale = expected.float().abs().max().clamp(min=1e-30)
    error = ((actual.float() - expected.float()).abs().max() / scale).item()
    assert error <= RELATIVE[dtype], f"relative error {error:.2e} > {RELATIVE[dtype]:.0e}"
