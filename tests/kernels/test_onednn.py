"""The onednn backend against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.kernels import create_backend
from expert_service.kernels.cpu.grouping import BlockSizes, group_by_expert
from expert_service.kernels.cpu.onednn import OneDnnBackend, block_rows
from expert_service.kernels.reference import ReferenceBackend
from expertmesh.dispatch import partial_dtype
from expertmesh.errors import ConfigError
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot
from tests.kernels.tolerances import assert_close

EXPERTS = 6  # routed; id 6 is the shared one, twice as wide
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYER = 3


def _spec(hidden: int = 48, width: int = 20) -> ModelSpec:
    layer = LayerSpec(
        index=LAYER,
        num_experts=EXPERTS,
        intermediate_size=width,
        shared_intermediate_size=2 * width,
        gate=GateSpec(score="softmax", top_k=2),
    )
    return ModelSpec(model_type="test", hidden_size=hidden, dtype=torch.float32, layers=(layer,))


def _experts(spec: ModelSpec, dtype: torch.dtype) -> dict[Slot, ExpertWeights]:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    hidden, layer = spec.hidden_size, spec.layers[0]
    return {
        slot: ExpertWeights(
            matrix(layer.width(slot.expert), hidden),
            matrix(layer.width(slot.expert), hidden),
            matrix(hidden, layer.width(slot.expert)),
        )
        for slot in layer.slots()
    }


def _pair(
    dtype: torch.dtype, hidden: int = 48, width: int = 20
) -> tuple[OneDnnBackend, ReferenceBackend]:
    """Both backends with the same weights; onednn's buffers are poisoned with NaN."""
    spec = _spec(hidden, width)
    onednn, reference = OneDnnBackend(spec, dtype, threads=1), ReferenceBackend()
    for slot, weights in _experts(spec, dtype).items():
        onednn.load(slot, weights)
        reference.load(slot, weights)
    _poison(onednn)
    return onednn, reference


def _poison(backend: OneDnnBackend) -> None:
    backend._x.take(256, torch.float32).fill_(torch.nan)
    backend._y.take(2048, torch.float32).fill_(torch.nan)


def _routing(rows: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """k different ids of 0 .. EXPERTS for each row, and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS + 1, generator=generator).argsort(dim=1)[:, :k]
    return ids.to(torch.int32), torch.rand(rows, k, generator=generator)


def _hidden(rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 100])
def test_onednn_equals_the_reference(rows: int, k: int, dtype: torch.dtype) -> None:
    onednn, reference = _pair(dtype)
    call = (LAYER, _hidden(rows, 48, dtype), *_routing(rows, k))

    assert_close(onednn.compute(*call), reference.compute(*call), dtype)


@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (48, 20), (17, 5), (1, 1), (256, 96)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size_of_expert_works(hidden: int, width: int, dtype: torch.dtype) -> None:
    onednn, reference = _pair(dtype, hidden, width)
    onednn.finish_loading()
    call = (LAYER, _hidden(9, hidden, dtype), *_routing(9, 2))

    assert_close(onednn.compute(*call), reference.compute(*call), dtype)


@pytest.mark.parametrize("caller", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_result_has_the_dtype_of_the_callers_partial_sums(
    rows: int, dtype: torch.dtype, caller: torch.dtype
) -> None:
    onednn, reference = _pair(dtype)
    call = (LAYER, _hidden(rows, 48, caller), *_routing(rows, 3))

    out = onednn.compute(*call)

    assert out.dtype == partial_dtype(caller)
    assert_close(out, reference.compute(*call), max(dtype, caller, key=_coarseness))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_sum_that_float16_does_not_have_reaches_a_caller_of_float16_rows(
    rows: int, dtype: torch.dtype
) -> None:
    onednn, reference = _pair(dtype)
    ids, _ = _routing(rows, 1)
    call = (LAYER, _hidden(rows, 48, torch.float16), ids, torch.full((rows, 1), 1e7))

    out = onednn.compute(*call)

    assert out.abs().max() > torch.finfo(torch.float16).max
    assert_close(out, reference.compute(*call), max(dtype, torch.float16, key=_coarseness))


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    k=st.integers(1, EXPERTS + 1),
    holes=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_any_routing_with_holes_equals_the_reference(
    rows: int, k: int, holes: float, seed: int
) -> None:
    onednn, reference = _pair(torch.float32)
    ids, weights = _routing(rows, k, seed)
    hole = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < holes
    ids[hole], weights[hole] = -1, torch.nan  # nobody may read the weight of a hole
    call = (LAYER, _hidden(rows, 48, torch.float32), ids)

    expected = reference.compute(*call, weights.nan_to_num())

    assert_close(onednn.compute(*call, weights), expected, torch.float32)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_row_that_asks_nobody_gives_zeros(rows: int) -> None:
    onednn, _ = _pair(torch.bfloat16)
    ids = torch.full((rows, 3), -1, dtype=torch.int32)

    out = onednn.compute(LAYER, _hidden(rows, 48, torch.bfloat16), ids, torch.ones(rows, 3))

    assert torch.equal(out, torch.zeros(rows, 48, dtype=torch.bfloat16))


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("expert", [2, EXPERTS], ids=["routed", "shared"])
@pytest.mark.parametrize("rows", [1, 63, 64, 1100])
def test_all_rows_on_one_expert_equal_the_reference(rows: int, expert: int, weight: float) -> None:
    onednn, reference = _pair(torch.float32)
    ids = torch.full((rows, 1), expert, dtype=torch.int32)
    call = (LAYER, _hidden(rows, 48, torch.float32), ids, torch.full((rows, 1), weight))

    assert_close(onednn.compute(*call), reference.compute(*call), torch.float32)


def test_the_same_call_gives_the_same_bits() -> None:
    onednn, _ = _pair(torch.bfloat16)
    call = (LAYER, _hidden(100, 48, torch.bfloat16), *_routing(100, 4))
    first = onednn.compute(*call)
    onednn.compute(LAYER, _hidden(200, 48, torch.bfloat16), *_routing(200, 7))
    _poison(onednn)

    assert torch.equal(onednn.compute(*call), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_a_row_alone_or_in_a_small_batch_is_as_in_a_large_one(
    rows: int, dtype: torch.dtype
) -> None:
    """Not bit by bit: oneDNN may take another kernel for another number of rows.

    On AVX-512 it keeps the order of sums, and the bits agree; only rounding may differ elsewhere.
    """
    onednn, _ = _pair(dtype)
    hidden, (ids, weights) = _hidden(100, 48, dtype), _routing(100, 3)
    large = onednn.compute(LAYER, hidden, ids, weights)

    small = onednn.compute(LAYER, hidden[:rows], ids[:rows], weights[:rows])

    assert_close(small, large[:rows], dtype)


def test_a_sum_is_accumulated_in_float32_and_rounded_once() -> None:
    """Seven bf16 outputs of which each rounding on the way would show."""
    _, reference = _pair(torch.float32)
    call = (_hidden(64, 48, torch.float32), *_routing(64, 7))
    exact = reference.compute(LAYER, *call)
    onednn_16, _ = _pair(torch.bfloat16)
    ids, weights = call[1:]
    wide = onednn_16.compute(LAYER, call[0].bfloat16().float(), ids, weights)

    rounded = onednn_16.compute(LAYER, call[0].bfloat16(), ids, weights)

    assert_close(wide, exact, torch.bfloat16)
    # One ulp where float32's own last bits fall on the two sides of a tie; never more.
    assert (rounded == wide.bfloat16()).float().mean() > 0.99


def test_a_nan_in_one_row_stays_there() -> None:
    onednn, _ = _pair(torch.bfloat16)
    hidden = _hidden(10, 48, torch.bfloat16)
    hidden[4] = torch.nan

    out = onednn.compute(LAYER, hidden, *_routing(10, 3))

    assert out.isnan().any(dim=1).nonzero().tolist() == [[4]]


def test_a_dropped_expert_is_gone() -> None:
    onednn, _ = _pair(torch.float32)
    onednn.drop(Slot(LAYER, 1))

    with pytest.raises(KeyError):
        onednn.drop(Slot(LAYER, 1))


def test_blocks_have_few_sizes_and_little_padding() -> None:
    sizes = {block_rows(rows) for rows in range(1, 1025)}

    assert len(sizes) == 73
    assert all(rows <= block_rows(rows) <= rows * 1.125 + 1 for rows in range(1, 1025))
    assert block_rows(1, smallest=4) == 4


def test_blocks_cover_all_places_and_pairs_go_where_their_expert_is() -> None:
    ids, weights = _routing(300, 3)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = -1
    sizes = BlockSizes(lambda rows: -(-rows // 8) * 8, largest=32)

    grouping = group_by_expert(ids, weights, sizes)

    starts, stops = ([block[i] for block in grouping.blocks] for i in (1, 2))
    assert [0, *stops[:-1]] == starts
    assert len(grouping.rows) == stops[-1]
    assert {stop - start for start, stop in zip(starts, stops, strict=True)} <= {8, 16, 24, 32}
    expert_of_place = torch.cat(
        [torch.full((stop - start,), expert) for expert, start, stop in grouping.blocks]
    )
    kept = ids >= 0
    assert torch.equal(expert_of_place[grouping.places], ids[kept].long())
    assert torch.equal(grouping.rows[grouping.places], kept.nonzero()[:, 0])
    assert len(grouping.places.unique()) == len(grouping.places)


def test_one_row_is_grouped_as_the_same_row_in_a_batch() -> None:
    ids, weights = torch.tensor([[4, -1, 0, 5]], dtype=torch.int32), torch.rand(1, 4)
    sizes = BlockSizes(lambda rows: max(rows, 4), largest=32)
    nobody = torch.full_like(ids, -1)

    alone = group_by_expert(ids, weights, sizes)
    among = group_by_expert(torch.cat([ids, nobody]), torch.cat([weights, weights]), sizes)

    assert alone.blocks == among.blocks == [(0, 0, 4), (4, 4, 8), (5, 8, 12)]
    for one, other in zip(alone[1:4], among[1:4], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "device"),
    [("onednn", "cuda"), ("auto", "cuda"), ("magic", "cpu"), ("onednn", "tpu")],
)
def test_a_backend_that_is_not_there_is_refused(name: str, device: str) -> None:
    with pytest.raises(ConfigError):
        create_backend(name, device, torch.float32, _spec(), threads=1)


def test_auto_takes_onednn_on_the_cpu() -> None:
    assert create_backend("auto", "auto", torch.float32, _spec(), threads=1).name == "onednn/cpu"


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_weights_compute_the_same_bits_as_others(dtype: torch.dtype) -> None:
    spec = _spec()
    experts = _experts(spec, dtype)
    plain, prepared = (create_backend("onednn", "cpu", dtype, spec, 1) for _ in range(2))
    pauses = []
    for slot, weights in experts.items():
        plain.load(slot, weights)
        prepared.load(slot, prepared.prepare(weights, lambda: pauses.append(1)))
    hidden = torch.randn(9, spec.hidden_size).to(dtype)
    ids = torch.tensor([[row % EXPERTS, EXPERTS] for row in range(9)], dtype=torch.int32)
    pairs = ids, torch.full(ids.shape, 0.5)

    outputs = [backend.compute(LAYER, hidden, *pairs) for backend in (plain, prepared)]

    assert torch.equal(*outputs)
    assert len(pauses) == 3 * len(experts), "it may rest after each matrix"
