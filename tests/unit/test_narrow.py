"""Narrow hidden states: what is lost is what docs/protocol.md says, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from expertmesh.codec import narrow
from expertmesh.codec.narrow import FP8
from expertmesh.errors import InvalidRequestError

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def drawn(rows: int = 130, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def outlier_heavy(rows: int = 130, width: int = 64) -> torch.Tensor:
    """A hundredth of all elements is a thousand times as large, and rows differ by 2^40."""
    hidden = drawn(rows, width)
    hidden[torch.rand(rows, width, generator=torch.Generator().manual_seed(1)) < 0.01] *= 1000.0
    return hidden * torch.logspace(-6, 6, rows)[:, None]


def there_and_back(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return narrow.widened(*narrow.narrowed(hidden, dtype), hidden.dtype)


def row_errors(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """|got - wanted| / |wanted|, Euclidean, of each row."""
    norm = torch.linalg.vector_norm
    return norm(got.double() - wanted.double(), dim=1) / norm(wanted.double(), dim=1)


@pytest.mark.parametrize("hidden", [drawn(), outlier_heavy()], ids=["normal", "outlier-heavy"])
def test_bfloat16_is_off_by_less_than_four_thousandths_of_a_row(hidden) -> None:
    errors = row_errors(there_and_back(hidden, torch.bfloat16), hidden)

    assert 0.0 < errors.mean() <= 0.002
    assert errors.max() <= 0.004


@pytest.mark.parametrize("hidden", [drawn(), outlier_heavy()], ids=["normal", "outlier-heavy"])
def test_fp8_is_off_by_three_hundredths_of_a_row(hidden) -> None:
    errors = row_errors(there_and_back(hidden, FP8), hidden)

    assert 0.005 < errors.mean() <= 0.03
    assert errors.max() <= 2**-4


@dtypes
def test_no_element_is_off_by_more_than_a_sixteenth_or_a_thousandth_of_the_scale(dtype) -> None:
    hidden = (outlier_heavy() / 64).to(dtype)
    hidden = hidden[(hidden.isfinite() & (hidden != 0)).all(1)]  # of float16's small range

    _, scale = narrow.narrowed(hidden, FP8)
    off = (there_and_back(hidden, FP8).double() - hidden.double()).abs()

    assert len(hidden) > 40
    assert (off <= torch.maximum(hidden.double().abs() / 16, scale[:, None].double() / 1024)).all()


@dtypes
def test_a_scale_is_the_least_power_of_two_that_brings_a_row_below_448(dtype) -> None:
    largest = torch.tensor([0.0, 448.0, 452.0, 224.0, 225.0, 7.0, 1.0, 60000.0])
    hidden = torch.zeros(8, 4)
    hidden[:, 1] = -largest

    _, scale = narrow.narrowed(hidden.to(dtype), FP8)

    assert scale is not None
    assert scale[1:].tolist() == [1.0, 2.0, 0.5, 1.0, 2.0**-6, 2.0**-8, 256.0]


def test_what_is_narrowed_twice_is_what_was_narrowed_once() -> None:
    """So a router that widens and narrows again on the way loses nothing more."""
    once = there_and_back(drawn().bfloat16(), FP8)

    assert torch.equal(there_and_back(once, FP8), once)


@pytest.mark.parametrize("wide", FLOATS[::2], ids=str)
def test_every_fp8_element_times_a_power_of_two_is_exact(wide) -> None:
    codes = torch.arange(256).to(torch.uint8)
    elements = codes[(codes & 0x7F) != 0x7F].view(FP8).view(2, 127)
    scale = torch.tensor([2.0**-40, 2.0**60])

    got = narrow.widened(elements, scale, wide)

    assert torch.equal(got.double(), elements.double() * scale[:, None].double())


@pytest.mark.parametrize("width", [1, 3, 64])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65])
def test_any_shape_is_widened_as_its_definition_says(rows, width) -> None:
    hidden = drawn(rows, width, seed=rows)

    elements, scale = narrow.narrowed(hidden, FP8)

    assert scale is not None
    assert (elements.shape, scale.shape) == (hidden.shape, (rows,))
    assert torch.equal(
        narrow.widened(elements, scale, torch.float32), elements.float() * scale[:, None]
    )


def test_any_scale_is_multiplied_in_float32_and_rounded_once() -> None:
    elements = drawn(5, 6).to(FP8)
    scale = torch.tensor([0.1, 3.7, 1e-30, 1e30, 7.0])

    got = narrow.widened(elements, scale, torch.bfloat16)

    assert torch.equal(got, (elements.float() * scale[:, None]).bfloat16())


@dtypes
def test_nan_and_infinity_arrive_as_nan_and_spoil_no_other_row(dtype) -> None:
    hidden = drawn(70).to(dtype)
    hidden[3, 5], hidden[66, 0], hidden[67, 63] = NAN, INF, -INF
    clean = [row for row in range(70) if row not in (3, 66, 67)]

    got = there_and_back(hidden, FP8)

    assert got[3, 5].isnan()
    assert got[66, 0].isnan()
    assert got[67, 63].isnan()
    assert torch.equal(got[clean], there_and_back(hidden[clean], FP8))


def test_the_largest_and_the_smallest_floats_stay_finite() -> None:
    hidden = torch.tensor([[torch.finfo(torch.float32).max, 1.0], [1e-45, 0.0]])

    got = there_and_back(hidden, FP8)

    assert got.isfinite().all()
    assert got[0, 0] >= 2.9e38


@pytest.mark.parametrize(
    ("dtype", "wire", "travels"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, FP8, FP8),
        (torch.float32, None, torch.float32),
        (torch.int32, FP8, torch.int32),
        (FP8, FP8, FP8),
    ],
    ids=str,
)
def test_only_floats_that_are_wider_are_narrowed(dtype, wire, travels) -> None:
    hidden = drawn(2).to(dtype)

    got, scale = narrow.narrowed(hidden, wire)

    assert got.dtype == travels
    assert (scale is not None) == (travels == FP8 and dtype != FP8)


def test_a_strided_tensor_is_narrowed_row_by_row() -> None:
    hidden = drawn(64, 70).t()

    got, scale = narrow.narrowed(hidden, FP8)
    again, same = narrow.narrowed(hidden.contiguous(), FP8)

    assert torch.equal(got.view(torch.uint8), again.view(torch.uint8))
    assert torch.equal(scale, same)


@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [
        (None, None),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("fp8", FP8),
        ("float8_e4m3fn", FP8),
        (FP8, FP8),
    ],
    ids=str,
)
def test_a_setting_names_its_dtype(wanted, dtype) -> None:
    assert narrow.wire_dtype(wanted) == dtype


@pytest.mark.parametrize("wanted", ["int8", "", torch.float32, torch.float8_e5m2, 8], ids=str)
def test_a_setting_that_names_none_is_refused(wanted) -> None:
    with pytest.raises(InvalidRequestError, match="expected bfloat16, bf16, float8_e4m3fn, fp8"):
        narrow.wire_dtype(wanted)
