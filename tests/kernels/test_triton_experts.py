"""The grouped experts and the kernels they are made of, against the reference.

Under Triton's interpreter, bfloat16 arithmetic is silently wrong: it counts on a GPU only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.kernels import triton_reference as reference
from expert_service.kernels.triton_down import down
from expert_service.kernels.triton_experts import grouped_swiglu_experts
from expert_service.kernels.triton_gate_up import gate_up
from expert_service.kernels.triton_matrices import ExpertMatrices
from expert_service.kernels.triton_reduce import reduce
from expert_service.kernels.triton_route import Route, route
from expert_service.kernels.triton_tiles import Tile, Tiles, down_tile, gate_up_tile
from tests.kernels.tolerances import assert_close

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
SIZES = [(64, 32), (48, 20), (17, 5), (1, 1), (130, 70)]
EXPERTS = 6


@pytest.fixture(autouse=True, scope="module")
def _what_is_not_written_is_poison() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _on_device(experts: ExpertMatrices) -> ExpertMatrices:
    return ExpertMatrices(*(None if each is None else each.to(DEVICE) for each in experts))


def _experts(
    dtype: torch.dtype, hidden: int = 48, width: int = 20, slots: int = EXPERTS
) -> ExpertMatrices:
    generator = torch.Generator().manual_seed(0)

    def matrices(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(slots, rows, columns, generator=generator) / columns**0.5).to(dtype)

    return ExpertMatrices(matrices(width, hidden), matrices(width, hidden), matrices(hidden, width))


def _hidden(rows: int, dtype: torch.dtype, hidden: int = 48) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)


def _routing(
    rows: int, k: int, experts: int = EXPERTS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """k different ids for each row, and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator).argsort(dim=1)[:, :k]
    return ids.to(torch.int32).contiguous(), torch.rand(rows, k, generator=generator)


def _run(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertMatrices,
    local_slots: torch.Tensor | None = None,
    block_m: int | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    inputs = (tensor.to(DEVICE) for tensor in (hidden, ids, weights))
    on_device = None if local_slots is None else local_slots.to(DEVICE)
    return grouped_swiglu_experts(*inputs, _on_device(experts), on_device, block_m, tiles).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "k"), [*product([0, 1, 63, 100], [1, 2, 8]), *product([9], [3, 4, 5, 6, 7])]
)
def test_experts_equal_the_reference(rows: int, k: int, dtype: torch.dtype) -> None:
    experts = _experts(dtype, slots=9)
    call = (_hidden(rows, dtype), *_routing(rows, k, experts=9))

    out = _run(*call, experts)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@pytest.mark.parametrize(("hidden", "width"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size_of_expert_works(hidden: int, width: int, dtype: torch.dtype) -> None:
    experts = _experts(dtype, hidden, width)
    call = (_hidden(9, dtype, hidden), *_routing(9, 2))

    out = _run(*call, experts)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_gives_the_same_result(block_m: int, dtype: torch.dtype) -> None:
    experts = _experts(dtype, hidden=150, width=140)
    call = (_hidden(40, dtype, 150), *_routing(40, 2))

    out = _run(*call, experts, block_m=block_m)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@pytest.mark.parametrize("group_m", [1, 2, 5, 64])
def test_the_order_of_blocks_does_not_matter(group_m: int) -> None:
    experts = _experts(torch.float32, hidden=40, width=36)
    call = (_hidden(50, torch.float32, 40), *_routing(50, 3))
    tile = Tile(16, 16, 16, group_m, 4, 2)

    out = _run(*call, experts, tiles=Tiles(tile, tile))

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 63, 100])
def test_all_rows_on_one_expert_equal_the_reference(rows: int, dtype: torch.dtype) -> None:
    """All other experts are empty."""
    experts = _experts(dtype)
    ids = torch.full((rows, 1), 4, dtype=torch.int32)
    call = (_hidden(rows, dtype), ids, torch.full((rows, 1), 0.25))

    out = _run(*call, experts)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), dtype)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 40),
    k=st.integers(1, 8),
    held=st.floats(0, 1),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_any_routing_equals_the_reference(
    rows: int, k: int, held: float, holes: float, seed: int
) -> None:
    """Ids that are not held or ask nobody add nothing; nobody reads their weights."""
    generator = torch.Generator().manual_seed(seed)
    ids, weights = _routing(rows, k, experts=10, seed=seed)
    ids[torch.rand(ids.shape, generator=generator) < holes] = -1
    local_slots = torch.full((10,), -1, dtype=torch.int32)
    local_slots[torch.randperm(10, generator=generator)[:EXPERTS]] = torch.arange(
        EXPERTS, dtype=torch.int32
    )
    local_slots[torch.rand(10, generator=generator) > held] = -1
    dropped = (ids < 0) | (local_slots[ids.clamp(min=0)] < 0)
    experts, hidden = _experts(torch.float32), _hidden(rows, torch.float32)
    expected = reference.grouped_swiglu_experts(hidden, ids, weights, experts, local_slots)
    weights[dropped] = torch.nan

    out = _run(hidden, ids, weights, experts, local_slots)

    assert_close(out, expected, torch.float32)
    assert (out[dropped.all(dim=1)] == 0).all()


@pytest.mark.parametrize(("slots", "k"), [(0, 2), (EXPERTS, 0)], ids=["no slots", "nobody asked"])
def test_nothing_to_compute_gives_zeros(slots: int, k: int) -> None:
    hidden = _hidden(3, torch.float32)

    out = _run(hidden, *_routing(3, k), _experts(torch.float32, slots=slots))

    assert torch.equal(out, torch.zeros(3, 48))


@pytest.mark.parametrize("rows", [3, 100])
def test_the_same_call_gives_the_same_bits(rows: int) -> None:
    experts = _experts(torch.float16)
    call = (_hidden(rows, torch.float16), *_routing(rows, 4), experts)

    assert torch.equal(_run(*call), _run(*call))


def test_a_row_does_not_depend_on_the_others_of_its_batch() -> None:
    """With one size of block; another may sum in another order."""
    experts = _experts(torch.float16)
    hidden, (ids, weights) = _hidden(60, torch.float16), _routing(60, 3)
    together = _run(hidden, ids, weights, experts, block_m=16)

    alone = _run(hidden[7:8], ids[7:8], weights[7:8], experts, block_m=16)

    assert torch.equal(alone, together[7:8])


@pytest.mark.parametrize("row", [0, 4])
def test_a_nan_in_one_row_stays_there(row: int) -> None:
    hidden = _hidden(10, torch.float32)
    hidden[row] = torch.nan

    out = _run(hidden, *_routing(10, 3), _experts(torch.float32))

    assert out.isnan().any(dim=1).nonzero().tolist() == [[row]]


def test_weights_may_be_parts_of_larger_tensors() -> None:
    packed = torch.cat((_experts(torch.float32).gate_LIH, _experts(torch.float32).up_LIH), dim=1)
    experts = _experts(torch.float32)
    views = ExpertMatrices(packed[:, :20], packed[:, 20:], experts.down_LHI[:, :, :20])
    call = (torch.randn(5, 60)[:, :48], *_routing(5, 2))

    out = _run(*call, views)

    assert_close(out, reference.grouped_swiglu_experts(*call, experts), torch.float32)


def _routed_on_device(rows: int, k: int) -> tuple[Route, torch.Tensor]:
    ids, weights = _routing(rows, k)
    return route(ids.to(DEVICE), EXPERTS, 16), weights.to(DEVICE)


def _on_cpu(routed: Route) -> Route:
    return Route(*(tensor.cpu() for tensor in routed[:5]), *routed[5:])


def _filled(routed: Route) -> torch.Tensor:
    return routed.positions[routed.positions >= 0].long().sort().values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_up_equals_its_reference_and_leaves_padding_alone(dtype: torch.dtype) -> None:
    experts, hidden = _experts(dtype), _hidden(33, dtype)
    routed, _ = _routed_on_device(33, 2)
    tile = gate_up_tile(16, 48, 20, dtype.itemsize)

    on_device = _on_device(experts)
    h_AI = gate_up(hidden.to(DEVICE), on_device.gate_LIH, on_device.up_LIH, routed, tile).cpu()

    expected = reference.gate_up(hidden, experts.gate_LIH, experts.up_LIH, _on_cpu(routed), tile)
    filled = _filled(_on_cpu(routed))
    assert_close(h_AI[filled], expected[filled], dtype)
    assert h_AI.isnan().all(dim=1).sum() == len(h_AI) - len(filled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_down_equals_its_reference_and_leaves_padding_alone(dtype: torch.dtype) -> None:
    experts = _experts(dtype)
    routed, weights = _routed_on_device(33, 2)
    tile = down_tile(16, 48, 20, dtype.itemsize)
    filled = _filled(_on_cpu(routed))
    h_AI = torch.full((len(routed.pairs), 20), torch.nan, dtype=dtype)
    h_AI[filled] = _hidden(len(filled), dtype, 20)

    y_AH = down(h_AI.to(DEVICE), experts.down_LHI.to(DEVICE), weights, routed, tile).cpu()

    expected = reference.down(h_AI, experts.down_LHI, weights.cpu(), _on_cpu(routed), tile)
    assert_close(y_AH[filled], expected[filled], dtype)
    assert y_AH.isnan().all(dim=1).sum() == len(y_AH) - len(filled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 48, 1500])
def test_reduce_equals_its_reference(hidden: int, dtype: torch.dtype) -> None:
    y_AH = _hidden(30, dtype, hidden)
    y_AH[29] = torch.nan  # padding
    positions = torch.randperm(28).view(7, 4).to(torch.int32)
    positions[2, 1:3] = -1
    positions[5] = -1

    out = reduce(y_AH.to(DEVICE), positions.to(DEVICE)).cpu()

    assert torch.equal(out, reference.reduce(y_AH, positions))


def test_a_wrong_shape_is_refused_by_name() -> None:
    experts, hidden = _experts(torch.float32), _hidden(4, torch.float32)
    ids, weights = _routing(4, 2)
    routed = route(ids.to(DEVICE), EXPERTS, 16)
    tile = gate_up_tile(16, 48, 20, 4)
    h_AI = hidden.new_zeros(len(routed.pairs), 20)

    with pytest.raises(ValueError, match=r"hidden \(4, 47\), gate \(6, 20, 48\)"):
        gate_up(hidden[:, 1:], experts.gate_LIH, experts.up_LIH, routed, tile)
    with pytest.raises(ValueError, match=r"up is torch.float16; expected torch.float32"):
        gate_up(hidden, experts.gate_LIH, experts.up_LIH.half(), routed, tile)
    with pytest.raises(ValueError, match="the last dimension contiguous"):
        gate_up(hidden, experts.gate_LIH, experts.up_LIH.mT.contiguous().mT, routed, tile)
    with pytest.raises(ValueError, match="block_m 32; routed for 16"):
        gate_up(hidden, experts.gate_LIH, experts.up_LIH, routed, tile._replace(block_m=32))
    with pytest.raises(ValueError, match=r"gate \(5, 20, 48\), .*expected \[R, H\], \[L=6, I, H\]"):
        gate_up(hidden, experts.gate_LIH[1:], experts.up_LIH[1:], routed, tile)
    with pytest.raises(ValueError, match=r"h \(3, 20\), down \(6, 48, 20\)"):
        down(h_AI[:3], experts.down_LHI, weights, routed, tile)
    with pytest.raises(ValueError, match=r"down \(5, 48, 20\), .*expected .*\[L=6, H, I\]"):
        down(h_AI, experts.down_LHI[1:], weights, routed, tile)
    with pytest.raises(ValueError, match=r"weights are torch\.float64"):
        down(h_AI, experts.down_LHI, weights.double(), routed, tile)
    with pytest.raises(ValueError, match=r"down is torch\.float16"):
        down(h_AI, experts.down_LHI.half(), weights, routed, tile)
    with pytest.raises(ValueError, match="the last dimension contiguous"):
        down(h_AI, experts.down_LHI.mT.contiguous().mT, weights, routed, tile)
    with pytest.raises(ValueError, match="block_m 32; routed for 16"):
        down(h_AI, experts.down_LHI, weights, routed, tile._replace(block_m=32))
    with pytest.raises(ValueError, match=r"y \(4,\), positions \(4, 2\)"):
        reduce(hidden[:, 0], routed.positions)
    with pytest.raises(ValueError, match="y has strides"):
        reduce(hidden.T, routed.positions)
    with pytest.raises(ValueError, match=r"positions are torch\.int64"):
        reduce(hidden, routed.positions.long())
