"""The sum of partial sums in code of our own: bit by bit what torch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertmesh import dispatch
from expertmesh.dispatch import Contribution
from expertmesh.kernels.compiling import has_dot
from router_service.kernels.avx512_sum import Avx512Sum, create_avx512_sum
from tests.kernels.hosts import without_bf16

pytestmark = pytest.mark.skipif(
    create_avx512_sum() is None, reason="needs a CPU with AVX-512, and llvmlite"
)
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(scope="module", params=[True, False], ids=["bf16", "bits"])
def kernel(request: pytest.FixtureRequest) -> Avx512Sum:
    """As it is on CPUs with AVX-512 BF16, and on those without."""
    if not request.param:
        with without_bf16():
            return Avx512Sum(with_dot=False)
    if not has_dot():
        pytest.skip("needs AVX-512 BF16")
    return Avx512Sum(with_dot=True)


def _contributions(
    rows: int, width: int, dtype: torch.dtype, shares: list[float], seed: int = 0
) -> list[Contribution]:
    """Partial sums for so large a share of all rows each; every row for a share of 1."""
    generator = np.random.default_rng(seed)
    drawn = torch.Generator().manual_seed(seed)
    found: list[Contribution] = []
    for share in shares:
        some = None if share == 1 else np.flatnonzero(generator.random(rows) < share)
        count = rows if some is None else len(some)
        found.append((some, torch.randn(count, width, generator=drawn).to(dtype)))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 130])
@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize(
    "shares", [[1, 1, 1], [0.5, 0.5], [0.3, 1, 0.6], [0.1], [0.5] * 9, []], ids=str
)
def test_sums_are_those_of_torch(kernel, shares, width, rows, dtype) -> None:
    contributions = _contributions(rows, width, dtype, shares)
    hidden, room = torch.empty(rows, width, dtype=dtype), torch.full((rows, width), torch.nan)
    room = room.to(dtype)

    summed = dispatch.combine(hidden, contributions, room, kernel)

    assert summed is room
    assert kernel.takes(room, contributions)
    assert torch.equal(summed, dispatch.combine(hidden, contributions))


def test_every_number_is_rounded_as_torch_rounds_it(kernel) -> None:
    # One part is a number of 16 bits, the other adds half of its last digit, or a little more or
    # less: ties, both neighbours of them, and what overflows.
    patterns = torch.arange(0x0080, 0x7F80, dtype=torch.int32).repeat(3, 1)
    patterns = patterns[:, : patterns.shape[1] // 64 * 64]
    exact = (patterns << 16).view(torch.float32).contiguous()
    half = ((patterns << 16) + 0x8000).view(torch.float32) - exact
    added = half * torch.tensor([[0.9921875], [1.0], [1.0078125]])
    parts: list[Contribution] = [(None, each.bfloat16()) for each in (exact, added, -0.0 * exact)]
    hidden = torch.empty(exact.shape, dtype=torch.bfloat16)

    summed = dispatch.combine(hidden, parts, None, kernel)

    assert torch.equal(summed, dispatch.combine(hidden, parts))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_sum_may_take_the_place_of_a_partial_sum(kernel, place) -> None:
    contributions = _contributions(300, 128, torch.bfloat16, [1, 1, 1])
    hidden = torch.empty(300, 128, dtype=torch.bfloat16)
    expected = dispatch.combine(hidden, contributions)
    room = contributions[place][1]

    assert dispatch.combine(hidden, contributions, room, kernel) is room
    assert torch.equal(room, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_element(kernel, dtype) -> None:
    contributions = _contributions(4, 64, dtype, [1, 1, 1])
    contributions[0][1][1, 3], contributions[2][1][2, 5] = torch.nan, torch.inf
    contributions[1][1][2, 5] = -torch.inf
    hidden = torch.empty(4, 64, dtype=dtype)

    summed = dispatch.combine(hidden, contributions, None, kernel)

    expected = dispatch.combine(hidden, contributions)
    torch.testing.assert_close(summed, expected, rtol=0, atol=0, equal_nan=True)
    assert summed.isfinite().logical_not().nonzero().tolist() == [[1, 3], [2, 5]]


def test_what_the_kernel_does_not_know_is_left_to_torch(kernel) -> None:
    for dtype, width in ((torch.float16, 64), (torch.bfloat16, 96)):
        contributions = _contributions(3, width, dtype, [1, 1, 1])
        hidden = torch.empty(3, width, dtype=dtype)
        assert not kernel.takes(hidden, contributions)
        expected = dispatch.combine(hidden, contributions)
        assert torch.equal(dispatch.combine(hidden, contributions, None, kernel), expected)

    contributions = _contributions(3, 64, torch.float32, [1, 1, 1])
    out = torch.empty(3, 64)
    wide = [*contributions, (None, torch.ones(3, 64, dtype=torch.bfloat16))]
    strided = [*contributions, (None, torch.ones(3, 128)[:, ::2])]
    assert kernel.takes(out, contributions)
    assert not kernel.takes(out, wide)
    assert not kernel.takes(out, strided)
    assert not kernel.takes(torch.empty(3, 128)[:, ::2], contributions)
