"""Each kernel after the sorting, alone, against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expert_service.kernels.triton import reference
from expert_service.kernels.triton.matrices import FP8
from expert_service.kernels.triton.products.down import down
from expert_service.kernels.triton.products.gate_up import gate_up
from expert_service.kernels.triton.products.quantize import Rows
from expert_service.kernels.triton.products.reduce import reduce
from expert_service.kernels.triton.products.route import Route, route, route_later
from expert_service.kernels.triton.tables.tiles import Tile, rule_tiles
from tests.kernels.tolerances import assert_close
from tests.kernels.triton_cases import (
    DEVICE,
    DTYPES,
    EXPERTS,
    experts_of,
    on_cpu,
    on_device,
    routing_of,
    rows_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _routed_on_device(rows: int, k: int) -> tuple[Route, torch.Tensor]:
    ids, weights = routing_of(rows, k)
    return route(ids.to(DEVICE), EXPERTS, 16), weights.to(DEVICE)


def _filled(routed: Route) -> torch.Tensor:
    return routed.positions[routed.positions >= 0].long().sort().values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", [None, FP8], ids=["plain", "fp8"])
def test_gate_up_equals_its_reference_and_leaves_padding_alone(
    weights_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    experts, hidden = experts_of(weights_dtype or dtype), rows_of(33, dtype)
    routed, _ = _routed_on_device(33, 2)
    tile = rule_tiles(16, 48, 20, experts.precision()).gate_up

    h = gate_up(Rows(hidden.to(DEVICE)), on_device(experts), routed, tile)

    expected = reference.gate_up(Rows(hidden), experts, on_cpu(routed), tile)
    filled, h_AI = _filled(on_cpu(routed)), h.values_NC.cpu()
    assert_close(h_AI[filled], expected.values_NC[filled], dtype)
    assert h_AI.isnan().all(dim=1).sum() == len(h_AI) - len(filled)
    assert h.scale_NB is None


@pytest.mark.parametrize("has_map", [True, False], ids=["experts", "slots"])
@pytest.mark.parametrize(("rows", "k"), [(1, 1), (1, 9), (3, 4)])
def test_gate_up_fills_in_a_route_that_is_sorted_later(rows: int, k: int, has_map: bool) -> None:
    """A block for each pair; of ids that are not held, or ask nobody, an empty one."""
    ids, _ = routing_of(rows, k, experts=9)
    ids[0, 0] = -1
    local_slots = torch.tensor([5, -1, 0, 1, 7, 3, -1, 2, 4], dtype=torch.int32)
    experts, hidden = experts_of(torch.float32), rows_of(rows, torch.float32)
    tile = rule_tiles(16, 48, 20, "fp32").gate_up
    routed = route_later(ids.to(DEVICE), EXPERTS, 16, local_slots.to(DEVICE) if has_map else None)

    h = gate_up(Rows(hidden.to(DEVICE)), on_device(experts), routed, tile)

    expected = reference.route_later(ids, EXPERTS, 16, local_slots if has_map else None)
    expected_h = reference.gate_up(Rows(hidden), experts, expected, tile)
    filled = _filled(expected)
    for field in ("block_slots", "block_rows", "positions"):
        assert torch.equal(getattr(routed, field).cpu(), getattr(expected, field))
    assert torch.equal(routed.pairs.cpu()[filled], expected.pairs[filled])
    assert_close(h.values_NC.cpu()[filled], expected_h.values_NC[filled], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", [None, FP8], ids=["plain", "fp8"])
def test_down_equals_its_reference_and_leaves_padding_alone(
    weights_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    experts = experts_of(weights_dtype or dtype)
    routed, weights = _routed_on_device(33, 2)
    tile = rule_tiles(16, 48, 20, experts.precision()).down
    filled = _filled(on_cpu(routed))
    h_AI = torch.full((len(routed.pairs), 20), torch.nan, dtype=dtype)
    h_AI[filled] = rows_of(len(filled), dtype, 20)

    y_AH = down(Rows(h_AI.to(DEVICE)), on_device(experts), weights, routed, tile, dtype).cpu()

    expected = reference.down(Rows(h_AI), experts, weights.cpu(), on_cpu(routed), tile, dtype)
    assert_close(y_AH[filled], expected[filled], dtype)
    assert y_AH.isnan().all(dim=1).sum() == len(y_AH) - len(filled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 48, 1500])
def test_reduce_equals_its_reference(hidden: int, dtype: torch.dtype) -> None:
    y_AH = rows_of(30, dtype, hidden)
    y_AH[29] = torch.nan  # padding
    positions = torch.randperm(28).view(7, 4).to(torch.int32)
    positions[2, 1:3] = -1
    positions[5] = -1

    out = reduce(y_AH.to(DEVICE), positions.to(DEVICE)).cpu()

    assert torch.equal(out, reference.reduce(y_AH, positions))


def test_reduce_leaves_its_sum_unrounded_where_asked() -> None:
    y_AH = rows_of(8, torch.float16)
    positions = torch.randperm(8).view(2, 4).to(torch.int32)

    out = reduce(y_AH.to(DEVICE), positions.to(DEVICE), torch.float32).cpu()

    assert torch.equal(out, reference.reduce(y_AH, positions, torch.float32))
    assert not torch.equal(out, out.half().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 47)}, r"hidden \(4, 47\), gate \(6, 20, 48\)"),
        (
            {"hidden": torch.zeros(4, 48).half()},
            r"hidden is torch\.float16; expected",
        ),
        ({"hidden": torch.zeros(48, 4).T}, "the last dimension contiguous"),
        ({"gate_LIH": torch.zeros(5, 20, 48)}, r"gate \(5, 20, 48\), .*expected .*\[L=6, I, H\]"),
        (
            {"up_LIH": torch.zeros(6, 20, 48).half()},
            r"up is torch\.float16; expected",
        ),
        ({"up_LIH": torch.zeros(6, 48, 20).mT}, "the last dimension contiguous"),
        ({"gate_scale_LBC": torch.zeros(6, 1, 1)}, "gate is torch.float32; scales belong to"),
        ({"tile": Tile(32, 16, 16, 1, 4, 2)}, "block_m 32; routed for 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_gate_up_refuses_a_wrong_input_by_name(change: dict[str, Any], message: str) -> None:
    routed, _ = _routed_on_device(4, 2)
    hidden = change.pop("hidden", torch.zeros(4, 48))
    tile = change.pop("tile", Tile(16, 16, 16, 1, 4, 2))

    with pytest.raises(ValueError, match=message):
        gate_up(Rows(hidden), experts_of(torch.float32)._replace(**change), routed, tile)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(3, 20)}, r"h \(3, 20\), down \(6, 48, 20\)"),
        ({"h": torch.zeros(96, 20).half()}, r"h is torch\.float16; expected"),
        ({"down_LHI": torch.zeros(5, 48, 20)}, r"down \(5, 48, 20\), .*expected .*\[L=6, H, I\]"),
        ({"down_LHI": torch.zeros(6, 20, 48).mT}, "the last dimension contiguous"),
        ({"weights": torch.zeros(4, 2).double()}, r"weights are torch\.float64"),
        ({"tile": Tile(32, 16, 16, 1, 4, 2)}, "block_m 32; routed for 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_down_refuses_a_wrong_input_by_name(change: dict[str, Any], message: str) -> None:
    routed, weights = _routed_on_device(4, 2)
    h_AI = change.pop("h", torch.zeros(len(routed.pairs), 20))
    weights = change.pop("weights", weights)
    tile = change.pop("tile", Tile(16, 16, 16, 1, 4, 2))
    experts = experts_of(torch.float32)._replace(**change)

    with pytest.raises(ValueError, match=message):
        down(Rows(h_AI), experts, weights, routed, tile, torch.float32)


def test_reduce_refuses_a_wrong_input_by_name() -> None:
    y_AH, positions = torch.zeros(16, 48), torch.zeros(4, 2, dtype=torch.int32)

    with pytest.raises(ValueError, match=r"y \(16,\), positions \(4, 2\)"):
        reduce(y_AH[:, 0], positions)
    with pytest.raises(ValueError, match="y has strides"):
        reduce(y_AH.T, positions)
    with pytest.raises(ValueError, match=r"positions are torch\.int64"):
        reduce(y_AH, positions.long())
