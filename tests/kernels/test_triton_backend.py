"""The Triton backend against the reference: on a GPU, or on the CPU under Triton's interpreter.

Under the interpreter bfloat16 arithmetic is silently wrong, and FP8 is what torch makes of it:
bfloat16 counts on a GPU only.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.kernels import create_backend
from expert_service.kernels.reference import ReferenceBackend
from expert_service.kernels.triton.backend.backend import TritonBackend
from expert_service.kernels.triton.backend.buckets import (
    BUCKETS,
    bucket_rows,
    chunk_rows,
    likely_pairs,
    padded_pairs,
    split_rows,
    warm_rows,
)
from expert_service.kernels.triton.backend.device import InterpreterDevice
from expert_service.kernels.triton.backend.tiles import TileChoice
from expert_service.kernels.triton.tables.tiles import Tiles, rule_tiles_for
from expertmesh.dispatch import partial_dtype
from expertmesh.errors import ConfigError
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot
from tests.kernels.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
HIDDEN, WIDTH, SHARED_WIDTH, DENSE_WIDTH = 48, 20, 36, 24
EXPERTS = 6  # routed; id 6 is the shared one
SHARED = EXPERTS
DENSE_LAYER, LAYER, BARE_LAYER = 0, 1, 2


def _moe_layer(index: int, shared_width: int) -> LayerSpec:
    return LayerSpec(
        index=index,
        num_experts=EXPERTS,
        intermediate_size=WIDTH,
        shared_intermediate_size=shared_width,
        gate=GateSpec(score="softmax", top_k=3),
    )


SPEC = ModelSpec(
    model_type="test",
    hidden_size=HIDDEN,
    dtype=torch.float32,
    layers=(
        LayerSpec(
            index=DENSE_LAYER,
            num_experts=0,
            intermediate_size=0,
            shared_intermediate_size=DENSE_WIDTH,
        ),
        _moe_layer(LAYER, SHARED_WIDTH),
        _moe_layer(BARE_LAYER, 0),
    ),
)
SLOTS = [slot for layer in SPEC.layers for slot in layer.slots()]


def _weights(slot: Slot, dtype: torch.dtype = torch.float32, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(100 * slot.layer + slot.expert + 1000 * seed)
    width = SPEC.layers[slot.layer].width(slot.expert)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    return ExpertWeights(matrix(width, HIDDEN), matrix(width, HIDDEN), matrix(HIDDEN, width))


def _backend(
    dtype: torch.dtype = torch.float32, planned: Mapping[Slot, bool] | None = None
) -> TritonBackend:
    backend = create_backend("triton", "auto", dtype, SPEC, 1, planned=planned)
    assert isinstance(backend, TritonBackend)
    return backend


@cache
def _kept() -> tuple[TritonBackend, ReferenceBackend]:
    """In float32, for tests that change nothing."""
    return _loaded()


def _loaded(dtype: torch.dtype = torch.float32) -> tuple[TritonBackend, ReferenceBackend]:
    """Both backends with every slot, in an order that mixes layers and widths."""
    backend, reference = _backend(dtype, dict.fromkeys(SLOTS, False)), ReferenceBackend()
    for slot in sorted(SLOTS, key=lambda slot: slot.expert):
        backend.load(slot, _weights(slot, dtype))
        reference.load(slot, _weights(slot, dtype))
    backend.finish_loading()
    return backend, reference


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[TritonBackend, ReferenceBackend, torch.dtype]:
    return *_loaded(request.param), request.param


@pytest.fixture(scope="module")
def float32_pair() -> tuple[TritonBackend, ReferenceBackend]:
    return _kept()


def _hidden(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def _routing(
    rows: int, k: int, experts: int = EXPERTS, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """k different ids for each row, about a quarter of them -1, and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator).argsort(dim=1)[:, :k]
    ids[torch.rand(rows, k, generator=generator) < 0.25] = -1
    return ids.to(torch.int32).contiguous(), torch.rand(rows, k, generator=generator)


@pytest.mark.parametrize("rows", [1, 3, 63, 100])
def test_a_layer_with_a_wider_shared_expert_equals_the_reference(
    rows: int, pair: tuple[TritonBackend, ReferenceBackend, torch.dtype]
) -> None:
    backend, reference, dtype = pair
    ids, weights = _routing(rows, 4, EXPERTS + 1)
    call = (LAYER, _hidden(rows, dtype), ids, weights)

    assert_close(backend.compute(*call), reference.compute(*call), dtype)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_dense_layer_equals_the_reference(
    rows: int, pair: tuple[TritonBackend, ReferenceBackend, torch.dtype]
) -> None:
    backend, reference, dtype = pair
    ids, weights = torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1)
    call = (DENSE_LAYER, _hidden(rows, dtype), ids, weights)

    assert_close(backend.compute(*call), reference.compute(*call), dtype)


def test_more_rows_than_the_largest_bucket_go_in_pieces(
    float32_pair: tuple[TritonBackend, ReferenceBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, reference = float32_pair
    monkeypatch.setattr(backend, "_chunk", lambda layer: 100)
    call = (BARE_LAYER, _hidden(301), *_routing(301, 2))

    assert_close(backend.compute(*call), reference.compute(*call), torch.float32)


def test_a_caller_may_ask_for_more_experts_than_the_model_does(
    float32_pair: tuple[TritonBackend, ReferenceBackend],
) -> None:
    backend, reference = float32_pair
    call = (BARE_LAYER, _hidden(7), *_routing(7, 5))

    assert_close(backend.compute(*call), reference.compute(*call), torch.float32)


@pytest.mark.parametrize("layer", [LAYER, BARE_LAYER])
def test_a_batch_that_asks_nothing_gives_zeros(
    layer: int, float32_pair: tuple[TritonBackend, ReferenceBackend]
) -> None:
    backend, _ = float32_pair
    ids = torch.full((3, 2), -1, dtype=torch.int32)

    out = backend.compute(layer, _hidden(3), ids, torch.full((3, 2), torch.nan))

    assert torch.equal(out, torch.zeros(3, HIDDEN))


@pytest.mark.parametrize(("rows", "k"), [(0, 2), (4, 0)])
def test_a_batch_without_pairs_gives_zeros(
    rows: int, k: int, float32_pair: tuple[TritonBackend, ReferenceBackend]
) -> None:
    backend, _ = float32_pair
    ids, weights = torch.zeros(rows, k, dtype=torch.int32), torch.zeros(rows, k)

    out = backend.compute(LAYER, _hidden(rows, torch.float16), ids, weights)

    assert torch.equal(out, torch.zeros(rows, HIDDEN, dtype=partial_dtype(torch.float16)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_answer_has_the_dtype_of_the_questions_partial_sums(
    dtype: torch.dtype, float32_pair: tuple[TritonBackend, ReferenceBackend]
) -> None:
    backend, reference = float32_pair
    call = (LAYER, _hidden(5, dtype), *_routing(5, 3))

    assert_close(backend.compute(*call), reference.compute(*call), dtype)


@pytest.mark.parametrize("rows", [5, BUCKETS[-1] + 1])
def test_a_sum_of_float16_experts_that_float16_does_not_have_is_returned(rows: int) -> None:
    backend, reference = _loaded(torch.float16)
    ids, _ = _routing(rows, 3)
    call = (LAYER, _hidden(rows, torch.float16), ids, torch.full((rows, 3), 3e5))

    out = backend.compute(*call)

    assert out.dtype == torch.float32
    assert out.abs().max() > torch.finfo(torch.float16).max
    assert_close(out, reference.compute(*call), torch.float16)


def test_an_answer_is_not_changed_by_the_next_request(
    float32_pair: tuple[TritonBackend, ReferenceBackend],
) -> None:
    backend, _ = float32_pair
    first = backend.compute(LAYER, _hidden(4), *_routing(4, 3))
    kept = first.clone()

    backend.compute(LAYER, 2 * _hidden(4), *_routing(4, 3, seed=1))

    assert torch.equal(first, kept)


def test_equal_requests_get_equal_bits(
    float32_pair: tuple[TritonBackend, ReferenceBackend],
) -> None:
    backend, _ = float32_pair
    call = (LAYER, _hidden(40), *_routing(40, 4, EXPERTS + 1))

    first, second = backend.compute(*call), backend.compute(*call)

    assert torch.equal(first, second)


def test_a_row_that_is_not_finite_stays_alone(
    float32_pair: tuple[TritonBackend, ReferenceBackend],
) -> None:
    backend, reference = float32_pair
    hidden, (ids, weights) = _hidden(6), _routing(6, 3)
    clean = reference.compute(LAYER, hidden, ids, weights)
    hidden[2] = torch.nan

    out = backend.compute(LAYER, hidden, ids, weights)

    others = [0, 1, 3, 4, 5]
    assert_close(out[others], clean[others], torch.float32)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 20), k=st.integers(1, 6), seed=st.integers(0, 9), shared=st.booleans())
def test_any_routing_equals_the_reference(rows: int, k: int, seed: int, shared: bool) -> None:
    backend, reference = _kept()
    ids, weights = _routing(rows, k, EXPERTS + shared, seed)
    call = (LAYER, _hidden(rows), ids, weights)

    assert_close(backend.compute(*call), reference.compute(*call), torch.float32)


def test_slots_come_and_go_and_come_back() -> None:
    backend, reference = _loaded()
    call = (LAYER, _hidden(9), *_routing(9, 4, EXPERTS + 1))
    before = backend.compute(*call)

    for expert in (SHARED, 2, 4):
        backend.drop(Slot(LAYER, expert))
    for expert in (4, SHARED, 2):
        backend.load(Slot(LAYER, expert), _weights(Slot(LAYER, expert)))

    assert torch.equal(backend.compute(*call), before)
    assert_close(before, reference.compute(*call), torch.float32)


def test_what_was_dropped_is_not_computed_and_is_not_known() -> None:
    backend, reference = _loaded()
    ids, weights = _routing(9, 4)
    backend.drop(Slot(LAYER, 3))
    without = torch.where(ids == 3, -1, ids)

    out = backend.compute(LAYER, _hidden(9), ids, weights)

    assert (ids == 3).any()
    assert_close(out, reference.compute(LAYER, _hidden(9), without, weights), torch.float32)
    with pytest.raises(KeyError):
        backend.drop(Slot(LAYER, 3))


def test_an_expert_may_take_the_place_of_another() -> None:
    planned = dict.fromkeys([Slot(LAYER, 0), Slot(LAYER, 1)], False)
    backend, reference = _backend(planned=planned), ReferenceBackend()
    for expert in (0, 1):
        backend.load(Slot(LAYER, expert), _weights(Slot(LAYER, expert)))
    backend.finish_loading()
    backend.drop(Slot(LAYER, 0))

    backend.load(Slot(LAYER, 5), _weights(Slot(LAYER, 5)))

    for expert in (1, 5):
        reference.load(Slot(LAYER, expert), _weights(Slot(LAYER, expert)))
    ids = torch.tensor([[1, 5], [5, -1]], dtype=torch.int32)
    call = (LAYER, _hidden(2), ids, torch.rand(2, 2))
    assert_close(backend.compute(*call), reference.compute(*call), torch.float32)


@pytest.mark.parametrize("slots", [SLOTS, SLOTS[:3]], ids=["planned none", "planned some"])
def test_slots_that_nobody_planned_find_room_before_and_after_loading(slots: list[Slot]) -> None:
    planned = dict.fromkeys([slot for slot in SLOTS if slot not in slots], False)
    backend, reference = _backend(planned=planned), ReferenceBackend()
    ordered = sorted(SLOTS, key=lambda slot: slot in slots)
    for index, slot in enumerate(ordered):
        if index == len(SLOTS) // 2:
            backend.finish_loading()
        backend.load(slot, _weights(slot))
        reference.load(slot, _weights(slot))

    call = (LAYER, _hidden(9), *_routing(9, 4, EXPERTS + 1))
    assert_close(backend.compute(*call), reference.compute(*call), torch.float32)


def test_experts_take_memory_of_the_host_where_the_device_is_the_host() -> None:
    on_host = not torch.cuda.is_available()

    assert _backend(torch.float16).host_footprint(100, torch.float16) == (200 if on_host else 0)


class SmallDevice(InterpreterDevice):
    """One that has only so much memory free."""

    name = "small"

    def __init__(self, free: int) -> None:
        self.free = free

    def free_bytes(self) -> int:
        return self.free


def test_a_shard_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    planned = dict.fromkeys([Slot(LAYER, expert) for expert in range(EXPERTS + 1)], False)
    backend = TritonBackend(SPEC, torch.float16, SmallDevice(200 << 20), planned)

    with pytest.raises(ConfigError) as raised:
        backend.load(Slot(LAYER, 0), _weights(Slot(LAYER, 0), torch.float16))

    weights = "6 experts x 5.62 KiB of float16 + 1 experts x 10.12 KiB of float16 = 43.88 KiB"
    assert str(raised.value).startswith(weights)
    assert "but small has 200.00 MiB free: use more shards" in str(raised.value)


@pytest.mark.skipif(ON_GPU, reason="its device is the interpreter")
def test_a_slot_that_does_not_fit_later_leaves_the_others_served() -> None:
    device = SmallDevice(1 << 40)
    backend = TritonBackend(SPEC, torch.float32, device, {Slot(LAYER, 0): False})
    backend.load(Slot(LAYER, 0), _weights(Slot(LAYER, 0)))
    backend.finish_loading()
    ids = torch.zeros(1, 1, dtype=torch.int32)
    before = backend.compute(LAYER, _hidden(1), ids, torch.ones(1, 1))
    device.free = 1000

    with pytest.raises(ConfigError, match=r"2 experts x .* but small has 0\.98 KiB free"):
        backend.load(Slot(LAYER, 1), _weights(Slot(LAYER, 1)))

    assert torch.equal(backend.compute(LAYER, _hidden(1), ids, torch.ones(1, 1)), before)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("tried to allocate"), RuntimeError("CUDA error: out of memory")],
    ids=["torch", "cuda"],
)
def test_memory_that_runs_out_while_warming_up_is_told_with_the_arithmetic(
    error: RuntimeError,
) -> None:
    class Full(SmallDevice):
        def host_bytes(self, num_bytes: int) -> torch.Tensor:
            raise error

    backend = TritonBackend(SPEC, torch.float32, Full(1 << 40), {Slot(LAYER, 0): False})
    backend.load(Slot(LAYER, 0), _weights(Slot(LAYER, 0)))

    with pytest.raises(ConfigError, match=r"^1 experts x 11\.25 KiB of float32 .* on this GPU"):
        backend.finish_loading()


def test_buckets_hold_what_is_asked_and_little_more() -> None:
    for rows in range(1, BUCKETS[-1] + 1):
        bucket = bucket_rows(rows)
        assert bucket is not None
        assert rows <= bucket < 2 * rows or bucket == rows == 1

    assert bucket_rows(BUCKETS[-1] + 1) is None


@pytest.mark.parametrize(
    ("asked", "padded"), [(1, 9), (8, 9), (9, 9), (10, 16), (16, 16), (17, 32)]
)
def test_kernels_see_few_numbers_of_pairs(asked: int, padded: int) -> None:
    assert padded_pairs(asked, 9) == padded


@pytest.mark.parametrize(
    ("rows", "pieces"),
    [
        (1, [(0, 1)]),
        (100, [(0, 100)]),
        (101, [(0, 50), (50, 101)]),
        (250, [(0, 83), (83, 166), (166, 250)]),
    ],
)
def test_pieces_are_few_and_alike(rows: int, pieces: list[tuple[int, int]]) -> None:
    assert split_rows(rows, 100) == pieces


@pytest.mark.parametrize(
    ("experts", "k", "rows"), [(8, 8, 1024), (128, 8, 4096), (64, 6, 4096), (1, 1, 1024)]
)
def test_a_piece_is_large_enough_for_the_matrix_units(experts: int, k: int, rows: int) -> None:
    assert chunk_rows(experts, k) == rows


@pytest.mark.parametrize("chunk", [1024, 4096, 8192])
def test_every_tile_that_a_large_batch_may_use_is_warmed_up(chunk: int) -> None:
    choice = TileChoice("NVIDIA H200")

    def tiles(rows: int) -> Tiles:
        return choice.tiles(likely_pairs(rows, 9, 8, 257), (8, 7168, 2048), "bf16")

    warmed = warm_rows(chunk, tiles)

    assert {tiles(rows) for rows in warmed} == {tiles(rows) for rows in range(257, chunk + 1)}
    assert warmed[0] == chunk
    assert len(warmed) <= 12


def test_tiles_come_from_the_table_of_the_shard_and_else_from_the_rule() -> None:
    choice = TileChoice("NVIDIA H200")
    sizes = (8, 7168, 2048)
    table = choice.table(sizes, "bf16")

    assert table is not None
    assert choice.tiles(8, sizes, "bf16") == table.tiles(8, 8)
    assert choice.table((8, 48, 20), "fp32") is None
    assert choice.tiles(8, (8, 48, 20), "fp32") == rule_tiles_for(8, (8, 48, 20), "fp32")


@pytest.mark.parametrize(
    ("held", "pairs"),
    [(257, 900), (128, 400), (8, 100), (1, 100)],
    ids=["all", "half", "few", "one"],
)
def test_tiles_are_chosen_for_the_pairs_that_are_likely_here(held: int, pairs: int) -> None:
    assert likely_pairs(100, 9, held, 257) == pairs


@pytest.mark.parametrize(
    ("name", "device", "weights", "message"),
    [
        ("auto", "auto", "fp4", "weights 'fp4' is unknown"),
        ("auto", "auto", "fp8-w8a8", "no FP8 weights in blocks of 128 x 128"),
        ("onednn", "cuda", "auto", "runs on the cpu only"),
    ],
)
def test_what_cannot_run_is_refused(name: str, device: str, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backend(
            name, device, torch.float32, SPEC, 1, weights=weights, planned={Slot(LAYER, 0): False}
        )


def test_fp8_weights_on_a_cpu_backend_are_refused() -> None:
    planned = {Slot(LAYER, 0): True}

    with pytest.raises(ConfigError, match="backend 'onednn' computes in"):
        create_backend("onednn", "cpu", torch.float32, SPEC, 1, weights="fp8-w8a16",
                       planned=planned)  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_cuda_without_a_gpu_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="this process sees no CUDA device"):
        create_backend(name, "cuda", torch.float32, SPEC, 1)


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)

    with pytest.raises(ConfigError, match=r'needs a GPU: .* use backend "onednn"'):
        create_backend("triton", "cpu", torch.float32, SPEC, 1)


def test_a_server_on_the_cpu_imports_neither_triton_nor_ray() -> None:
    code = """
import sys
import torch
from expert_service import server
from expert_service.kernels import create_backend
from expertmesh.model import LayerSpec, ModelSpec
layer = LayerSpec(index=0, num_experts=0, intermediate_size=0, shared_intermediate_size=8)
spec = ModelSpec(model_type="test", hidden_size=8, dtype=torch.float32, layers=(layer,))
create_backend("auto", "cpu", torch.float32, spec, 1)
ours = [name for name in sys.modules if name.startswith("expert_service.kernels.triton")]
print([*ours, *({"triton", "ray"} & set(sys.modules))])
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("filled", [0, 1, 5, 8], ids=["empty", "one", "partial", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_recorded_bucket_equals_the_reference_however_full(
    filled: int, dtype: torch.dtype
) -> None:
    backend, reference = _loaded(dtype)
    ids, weights = _routing(8, 4, EXPERTS + 1)
    ids[filled:] = -1
    call = (LAYER, _hidden(8, dtype), ids, weights)

    first = backend.compute(*call)
    backend.compute(LAYER, _hidden(8, dtype), *_routing(8, 4, seed=3))  # other bits in between

    assert_close(first, reference.compute(*call), dtype)
    assert torch.equal(backend.compute(*call), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_on_three_streams_equal_the_reference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, reference = _loaded(dtype)
    monkeypatch.setattr(backend, "_chunk", lambda layer: 64)
    call = (LAYER, _hidden(1000, dtype), *_routing(1000, 4, EXPERTS + 1))
    expected = reference.compute(*call)

    for _ in range(20):
        assert_close(backend.compute(*call), expected, dtype)


@pytest.mark.gpu
def test_a_request_waits_for_the_device_once() -> None:
    backend, _ = _loaded(torch.bfloat16)
    waits = []

    class Watched(torch.cuda.Event):
        def synchronize(self) -> None:
            waits.append(self)
            super().synchronize()

    for rows in (4, 3000):
        call = (LAYER, _hidden(rows, torch.bfloat16), *_routing(rows, 4))
        backend.compute(*call)  # pinned memory of this size is there from now on
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "Event", Watched)
            waits.clear()
            torch.cuda.set_sync_debug_mode("error")
            try:
                backend.compute(*call)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(waits) == 1


@pytest.mark.gpu
def test_recorded_buckets_see_loads_drops_and_growth() -> None:
    backend, reference = _loaded(torch.bfloat16)
    call = (LAYER, _hidden(4, torch.bfloat16), *_routing(4, 3))
    backend.drop(Slot(LAYER, 2))
    for expert in (2, 1):
        weights = _weights(Slot(LAYER, expert), torch.bfloat16, seed=1)
        if expert == 1:
            backend.drop(Slot(LAYER, 1))
        backend.load(Slot(LAYER, expert), weights)
        reference.load(Slot(LAYER, expert), weights)

    assert_close(backend.compute(*call), reference.compute(*call), torch.bfloat16)


@pytest.mark.gpu
def test_several_backends_share_a_gpu() -> None:
    pairs = [_loaded(torch.bfloat16) for _ in range(3)]
    call = (LAYER, _hidden(50, torch.bfloat16), *_routing(50, 4, EXPERTS + 1))

    for backend, reference in pairs:
        assert_close(backend.compute(*call), reference.compute(*call), torch.bfloat16)


@pytest.mark.gpu
def test_a_shard_larger_than_the_gpu_is_refused_before_anything_is_allocated() -> None:
    layer = LayerSpec(
        index=0,
        num_experts=512,
        intermediate_size=1 << 16,
        shared_intermediate_size=0,
        gate=GateSpec(score="softmax", top_k=2),
    )
    spec = ModelSpec(model_type="test", hidden_size=1 << 14, dtype=torch.bfloat16, layers=(layer,))
    planned = dict.fromkeys(layer.slots(), False)
    backend = create_backend("triton", "cuda", torch.bfloat16, spec, 1, planned=planned)
    before = torch.cuda.memory_allocated()
    nothing = ExpertWeights(*(torch.empty(0, dtype=torch.bfloat16) for _ in range(3)))

    with pytest.raises(ConfigError, match=r"^512 experts x 6\.00 GiB of bfloat16 .* but cuda has"):
        backend.load(Slot(0, 0), nothing)

    assert torch.cuda.memory_allocated() == before
