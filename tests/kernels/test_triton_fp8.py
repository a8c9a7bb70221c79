"""The grouped experts with FP8 weights, against the reference; rounding of activations to FP8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.kernels.triton import reference
from expert_service.kernels.triton.matrices import FP8, ExpertMatrices
from expert_service.kernels.triton.products.down import down
from expert_service.kernels.triton.products.gate_up import gate_up
from expert_service.kernels.triton.products.quantize import Rows, quantize
from expert_service.kernels.triton.products.route import route
from expert_service.kernels.triton.tables.tiles import Tile
from tests.kernels.tolerances import W8A8_ERROR, assert_close
from tests.kernels.triton_cases import (
    DEVICE,
    DTYPES,
    EXPERTS,
    ON_GPU,
    experts_of,
    routing_of,
    rows_of,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Blocks of scales that are whole, ragged both ways, and more than one of each.
SIZES = [(256, 128), (48, 20), (1, 1), (130, 70), (150, 140)]
W8A8 = pytest.mark.parametrize("w8a8", [False, True], ids=["w8a16", "w8a8"])


def _tolerance(dtype: torch.dtype, w8a8: bool) -> torch.dtype:
    return FP8 if w8a8 else dtype


@W8A8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k"), [(0, 2), (1, 1), (1, 6), (63, 2), (100, 3)])
def test_experts_equal_the_reference(rows: int, k: int, dtype: torch.dtype, w8a8: bool) -> None:
    experts = experts_of(FP8)
    call = (rows_of(rows, dtype), *routing_of(rows, k))

    out = run(*call, experts, w8a8=w8a8)

    expected = reference.grouped_swiglu_experts(*call, experts, w8a8=w8a8)
    assert_close(out, expected, _tolerance(dtype, w8a8))


@W8A8
@pytest.mark.parametrize(("hidden", "width"), SIZES)
def test_any_size_of_expert_works(hidden: int, width: int, w8a8: bool) -> None:
    experts = experts_of(FP8, hidden, width, slots=3)
    call = (rows_of(5, torch.float32, hidden), *routing_of(5, 2, experts=3))

    out = run(*call, experts, w8a8=w8a8)

    expected = reference.grouped_swiglu_experts(*call, experts, w8a8=w8a8)
    assert_close(out, expected, _tolerance(torch.float32, w8a8))


@W8A8
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_every_tile_gives_the_same_result(block_m: int, w8a8: bool) -> None:
    experts = experts_of(FP8, hidden=150, width=140, slots=3)
    call = (rows_of(20, torch.float32, 150), *routing_of(20, 2, experts=3))

    out = run(*call, experts, block_m=block_m, w8a8=w8a8)

    expected = reference.grouped_swiglu_experts(*call, experts, w8a8=w8a8)
    assert_close(out, expected, _tolerance(torch.float32, w8a8))


@W8A8
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(0, 30),
    k=st.integers(1, 8),
    held=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_any_routing_equals_the_reference(
    w8a8: bool, rows: int, k: int, held: float, seed: int
) -> None:
    """Ids that are not held add nothing; nobody reads their weights."""
    ids, weights = routing_of(rows, k, experts=10, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    local_slots = torch.full((10,), -1, dtype=torch.int32)
    local_slots[torch.randperm(10, generator=generator)[:EXPERTS]] = torch.arange(
        EXPERTS, dtype=torch.int32
    )
    local_slots[torch.rand(10, generator=generator) > held] = -1
    experts, hidden = experts_of(FP8), rows_of(rows, torch.float32)
    expected = reference.grouped_swiglu_experts(
        hidden, ids, weights, experts, local_slots, w8a8=w8a8
    )
    weights[local_slots[ids.long()] < 0] = torch.nan

    out = run(hidden, ids, weights, experts, local_slots, w8a8=w8a8)

    assert_close(out, expected, _tolerance(torch.float32, w8a8))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounding_activations_costs_no_more_than_the_stated_error(seed: int) -> None:
    """The reference with w8a8, of which the kernels are a step away, against the one without."""
    experts = experts_of(FP8, hidden=512, width=384, slots=4)
    call = (rows_of(16, torch.float32, 512), *routing_of(16, 2, experts=4, seed=seed), experts)
    exact = reference.grouped_swiglu_experts(*call)

    rounded = reference.grouped_swiglu_experts(*call, w8a8=True)

    error = ((rounded - exact).norm() / exact.norm()).item()
    assert W8A8_ERROR / 2 < error < W8A8_ERROR


@W8A8
@pytest.mark.parametrize("rows", [3, 100])
def test_the_same_call_gives_the_same_bits(rows: int, w8a8: bool) -> None:
    call = (rows_of(rows, torch.float16), *routing_of(rows, 4), experts_of(FP8))

    assert torch.equal(run(*call, w8a8=w8a8), run(*call, w8a8=w8a8))


@W8A8
def test_a_row_does_not_depend_on_the_others_of_its_batch(w8a8: bool) -> None:
    """With one size of block; another may sum in another order."""
    experts = experts_of(FP8)
    hidden, (ids, weights) = rows_of(60, torch.float16), routing_of(60, 3)
    hidden[8] *= 10  # would show in a scale that rows share
    together = run(hidden, ids, weights, experts, block_m=16, w8a8=w8a8)

    alone = run(hidden[7:8], ids[7:8], weights[7:8], experts, block_m=16, w8a8=w8a8)

    assert torch.equal(alone, together[7:8])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 128), (40, 300), (0, 5)])
def test_quantize_equals_its_reference(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = rows_of(rows, torch.float32, columns) ** 9  # many are small beside the largest
    x = (x * torch.logspace(-6, -1, rows)[:, None]).to(dtype)

    values, scale = (tensor.cpu() for tensor in quantize(x.to(DEVICE)))

    expected, expected_scale = reference.quantize(x)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # A GPU's division may be an ulp away, which decides between two steps where it is a tie.
    assert (values.float() != expected.float()).sum() <= (1e-3 * x.numel() if ON_GPU else 0)


def test_a_row_of_zeros_has_a_scale() -> None:
    x = torch.zeros(2, 130)
    x[1, 129] = 3.0

    values, scale = (tensor.cpu() for tensor in quantize(x.to(DEVICE)))

    found = values.float() * scale.repeat_interleave(128, dim=1)[:, :130]
    torch.testing.assert_close(found, x, rtol=1e-6, atol=0)  # a GPU's division is an ulp away


def test_rows_of_fp8_may_be_part_of_a_larger_tensor() -> None:
    wide = rows_of(6, torch.float32, 80)

    part, whole = quantize(wide.to(DEVICE)[:, :48]), quantize(wide[:, :48].clone().to(DEVICE))

    assert torch.equal(part.values_NC.float(), whole.values_NC.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_scale_LBC": None}, "gate is torch.float8_e4m3fn; scales belong to"),
        (
            {"up_scale_LBC": torch.ones(6, 2, 1)},
            r"up_scale is torch.float32 \(6, 2, 1\); .*\(6, 1, 1",
        ),
        ({"gate_scale_LBC": torch.ones(6, 1, 1).double()}, "gate_scale is torch.float64"),
        ({"tile": Tile(16, 16, 256, 1, 4, 2)}, "16 x 256; expected at most 128"),
        ({"x": Rows(torch.zeros(4, 48).to(FP8))}, "hidden is torch.float8_e4m3fn; scales belong"),
        (
            {"x": Rows(torch.zeros(4, 48), torch.ones(4, 1))},
            "hidden is torch.float32; scales belong",
        ),
        (
            {"x": Rows(torch.zeros(4, 48).to(FP8), torch.ones(4, 2))},
            r"hidden_scale is torch.float32 \(4, 2\); expected contiguous float32 \(4, 1\)",
        ),
        (
            {"x": Rows(torch.zeros(4, 48).to(FP8), torch.ones(4, 1))},
            "block_n 16; expected 128, which share a scale of h",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_scales_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    routed = route(routing_of(4, 2)[0].to(DEVICE), EXPERTS, 16)
    x = change.pop("x", Rows(torch.zeros(4, 48)))
    tile = change.pop("tile", Tile(16, 16, 16, 1, 4, 2))

    with pytest.raises(ValueError, match=message):
        gate_up(x, experts_of(FP8)._replace(**change), routed, tile)


def test_down_refuses_scales_of_the_wrong_shape() -> None:
    ids, weights = routing_of(4, 2)
    routed = route(ids.to(DEVICE), EXPERTS, 16)
    experts = experts_of(FP8)._replace(down_scale_LBC=torch.ones(6, 1, 2))
    h = Rows(torch.zeros(len(routed.pairs), 20))

    with pytest.raises(ValueError, match=r"down_scale is torch.float32 \(6, 1, 2\)"):
        down(h, experts, weights, routed, Tile(16, 16, 16, 1, 4, 2), torch.float32)


def test_w8a8_is_for_fp8_weights_only() -> None:
    with pytest.raises(ValueError, match=r"weights are torch\.float32; expected torch\.float8"):
        run(rows_of(2, torch.float32), *routing_of(2, 1), experts_of(torch.float32), w8a8=True)


def test_weights_of_other_dtypes_are_refused() -> None:
    matrices = ExpertMatrices(*(each.double() for each in experts_of(torch.float32)[:3]))

    with pytest.raises(ValueError, match=r"weights are torch\.float64; expected torch\.float32"):
        run(rows_of(2, torch.float64), *routing_of(2, 1), matrices)


def test_quantize_refuses_rows_that_are_not_dense() -> None:
    with pytest.raises(ValueError, match="strides"):
        quantize(torch.zeros(4, 6).T)
