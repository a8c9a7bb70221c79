"""How far a backend may be from the float32 reference: the one table of the kernel tests.

Relative to the largest value of a result, and never relaxed by environment.
"""

from __future__ import annotations

import torch

RELATIVE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,  # 11 bits in x, in the intermediate and in y
    torch.bfloat16: 1e-2,  # 8 bits
    torch.float8_e4m3fn: 1e-2,  # w8a8: a last bit may round x or h another way, by 6 %
}
#: Norm of what w8a8 changes, relative to the result: 4 bits of x and of h.
W8A8_ERROR = 6e-2


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
