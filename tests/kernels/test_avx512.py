"""Our own kernels for bfloat16 experts on CPUs: against float32, and in the onednn backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import relative_error
from expert_service.kernels.cpu import avx512, avx512_experts
from expert_service.kernels.cpu.avx512 import Kernels, Pairs, Rows, compile_kernels
from expert_service.kernels.cpu.block_product import BlockProduct
from expert_service.kernels.cpu.onednn import OneDnnBackend
from expert_service.kernels.cpu.onednn_cpu import FallbackWarning
from expert_service.kernels.reference import ReferenceBackend
from expertmesh.dispatch import partial_dtype
from expertmesh.kernels.compiling import Matrix, has_compiler, has_dot
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot
from tests.kernels.hosts import without_bf16
from tests.kernels.tolerances import assert_close

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported() or not has_compiler(),
    reason="needs AVX-512 and llvmlite",
)
EXPERTS = 6  # routed; id 6 is the shared one, twice as wide
#: Norm of what 8 bits in weights, rows and intermediate change, relative to the result.
ERROR = 4e-2
H, I = 192, 128  # noqa: E741 # as in the kernels' formulas


@pytest.fixture(scope="module", params=[True, False], ids=["dot", "widened"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The code for CPUs with AVX-512 BF16, and for those without."""
    if not request.param:
        return _without_bf16("bf16")
    if not has_dot():
        pytest.skip("needs AVX-512 BF16")
    return Kernels(*avx512._compile("bf16", True))


def _without_bf16(weights: str) -> Kernels:
    with without_bf16():
        return Kernels(*avx512._compile(weights, False))


class Packed:
    """A matrix as oneDNN packs it."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.dense = matrix.bfloat16()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.dense, None)
        self.address = torch.ops.mkldnn.data_ptr(self._packed)


def _matrix(outputs: int, inputs: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    return Packed(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)


def _address(tensor: torch.Tensor) -> Matrix:
    return Matrix(tensor.data_ptr(), tensor.stride(0))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 24, 25, 61])
def test_gate_up_is_swiglu_without_its_last_product(kernels: Kernels, rows: int) -> None:
    gate, up = _matrix(I, H, 1), _matrix(I, H, 2)
    x = torch.randn(70, H, generator=torch.Generator().manual_seed(rows)).bfloat16()
    order = torch.randperm(70)[:rows]
    h = torch.full((rows, I), torch.nan, dtype=torch.bfloat16)

    job = BlockProduct(0, rows, gate.address, up.address, 0, I // 64, H // 2, 0, 0)
    kernels.gate_up(Rows(_address(x), 0), order.data_ptr(), _address(h), [job])

    wide = x[order].float()
    expected = torch.nn.functional.silu(wide @ gate.dense.float().T) * (wide @ up.dense.float().T)
    assert_close(h, expected.bfloat16(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 7, 25])
def test_down_writes_the_blocks_and_places_of_its_jobs_only(
    kernels: Kernels, rows: int, dtype: torch.dtype
) -> None:
    down = _matrix(H, I)
    h = torch.randn(40, I, generator=torch.Generator().manual_seed(rows)).bfloat16()
    y = torch.full((40, H), 7.0, dtype=dtype)
    identity = torch.arange(40)

    jobs = [
        BlockProduct(10, rows, down.address, 0, first, first + 1, I // 2, 0, 0) for first in (0, 2)
    ]
    kernels.down(dtype, Rows(_address(h), 0), identity.data_ptr(), _address(y), jobs)

    expected = torch.full((40, H), 7.0, dtype=dtype)
    product = (h[10 : 10 + rows].float() @ down.dense.float().T).to(dtype)
    for block in (slice(0, 64), slice(128, 192)):
        expected[10 : 10 + rows, block] = product[:, block]
    assert_close(y, expected, dtype)
    untouched = torch.ones(40, H, dtype=torch.bool)
    untouched[10 : 10 + rows] = False
    untouched[:, 64:128] = True
    assert (y[untouched] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sum_is_over_the_pairs_of_its_row(kernels: Kernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(20, H, generator=generator).to(dtype)
    places = torch.randperm(20, generator=generator)[:9]
    weights, offsets = torch.rand(9, generator=generator), torch.tensor([0, 4, 4, 9])
    out = torch.full((3, H), torch.nan, dtype=dtype)

    pairs = Pairs.of(places, weights, places, offsets)
    kernels.sum(dtype, _address(y), pairs, _address(out), H // 64, 0, 3)

    terms = y[places].float() * weights[:, None]
    expected = torch.stack([terms[:4].sum(dim=0), torch.zeros(H), terms[4:].sum(dim=0)])
    assert_close(out, expected.to(dtype), dtype)
    assert not out[1].any()


def test_silu_is_right_from_end_to_end_of_its_range(kernels: Kernels) -> None:
    """A diagonal gate and an up of 1 leave silu itself, rounded to bfloat16."""
    gate = Packed(torch.eye(64, 128))
    ones = torch.zeros(64, 128)
    ones[:, 127] = 1.0
    up = Packed(ones)
    magnitudes = torch.logspace(-20, 38, 1024)
    values = torch.cat([-magnitudes, magnitudes, torch.linspace(-100, 100, 2048)]).bfloat16()
    x = torch.zeros(len(values) // 64, 128, dtype=torch.bfloat16)
    x[:, :64], x[:, 127] = values.view(-1, 64), 1.0
    h = torch.empty(len(x), 64, dtype=torch.bfloat16)
    identity = torch.arange(len(x))

    job = BlockProduct(0, len(x), gate.address, up.address, 0, 1, 64, 0, 0)
    kernels.gate_up(Rows(_address(x), 0), identity.data_ptr(), _address(h), [job])

    exact = torch.nn.functional.silu(x[:, :64].double())
    error = (h.double() - exact).abs() / exact.abs().clamp(min=1e-30)
    # Half an ulp of bfloat16, and a little of float32. The far negative end is as good as zero.
    assert error[exact.abs() > 1e-30].max() < 2**-8
    assert (h.double()[exact.abs() <= 1e-30]).abs().max() < 1e-30


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_seen_and_stays_alone(kernels: Kernels, value: float) -> None:
    gate, up = _matrix(I, H, 1), _matrix(I, H, 2)
    x = torch.randn(7, H).bfloat16()
    x[3, 5] = value
    h = torch.zeros(7, I, dtype=torch.bfloat16)
    identity = torch.arange(7)

    job = BlockProduct(0, 7, gate.address, up.address, 0, I // 64, H // 2, 0, 0)
    kernels.gate_up(Rows(_address(x), 0), identity.data_ptr(), _address(h), [job])

    assert [row for row in range(7) if not h[row].isfinite().all()] == [3]


@pytest.fixture(scope="module")
def byte_kernels() -> Kernels:
    """The code for weights in bytes."""
    if not torch.cpu._is_vnni_supported():
        pytest.skip("needs AVX-512 VNNI")
    return Kernels(*avx512._compile("int8", True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_are_rounded_to_bytes_each_by_itself(
    byte_kernels: Kernels, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.tensor([1.0, 1e-30, 1e4, 3e37, 0.0])[:, None]
    x = (torch.rand(5, H, generator=generator) * 2 - 1).mul_(magnitudes).to(dtype)
    values, scales = torch.zeros(5, H, dtype=torch.uint8), torch.full((5,), 7.0)
    out = Rows(_address(values), scales.data_ptr())

    byte_kernels.round(dtype, _address(x), out, H // 64, 0, 5)

    exact = x.double()
    largest = exact.abs().amax(dim=1).clamp(min=2**-119)
    assert torch.allclose(scales.double(), largest / 127, rtol=1e-6, atol=0.0)
    meant = (values.double() - 128) * scales.double()[:, None]
    assert ((meant - exact).abs().amax(dim=1) <= 0.5001 * scales.double()).all()
    assert values.min() >= 1
    assert values[4].eq(128).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_scale_of_a_row_that_is_not_finite_is_not_either(
    byte_kernels: Kernels, value: float
) -> None:
    x = torch.randn(3, H)
    x[1, 100] = value
    values, scales = torch.zeros(3, H, dtype=torch.uint8), torch.zeros(3)

    out = Rows(_address(values), scales.data_ptr())
    byte_kernels.round(torch.float32, _address(x), out, H // 64, 0, 3)

    assert scales.isfinite().tolist() == [True, False, True]


def _spec(hidden: int = H, width: int = I) -> ModelSpec:
    layer = LayerSpec(
        index=0,
        num_experts=EXPERTS,
        intermediate_size=width,
        shared_intermediate_size=2 * width,
        gate=GateSpec(score="softmax", top_k=2),
    )
    return ModelSpec(model_type="test", hidden_size=hidden, dtype=torch.bfloat16, layers=(layer,))


def _pair(threads: int = 1, form: str = "auto") -> tuple[OneDnnBackend, ReferenceBackend]:
    """Both backends with the same weights; the first one's buffers are poisoned with NaN."""
    spec = _spec()
    ours, reference = OneDnnBackend(spec, torch.bfloat16, threads, form), ReferenceBackend()
    generator = torch.Generator().manual_seed(0)
    hidden, layer = spec.hidden_size, spec.layers[0]
    for slot in layer.slots():
        width = layer.width(slot.expert)
        shapes = (width, hidden), (width, hidden), (hidden, width)
        weights = ExpertWeights(
            *(
                (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).bfloat16()
                for shape in shapes
            )
        )
        ours.load(slot, weights)
        reference.load(slot, weights)
    ours.finish_loading()
    _poison(ours)
    return ours, reference


def _poison(backend: OneDnnBackend) -> None:
    if backend._own is None:
        return
    for buffer in backend._own._y.values():
        buffer.take(2000, H)
        buffer._values.fill_(torch.nan)


def _call(
    rows: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `Backend.compute`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS + 1, generator=generator).argsort(dim=1)[:, :k]
    hidden = torch.randn(rows, H, generator=generator).to(dtype)
    return 0, hidden, ids.to(torch.int32), torch.rand(rows, k, generator=generator)


@pytest.fixture(params=["together", "pieces", "slices"])
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The ways in which threads share a batch, each taken whatever the batch's size."""
    if request.param != "together":
        monkeypatch.setattr(avx512_experts, "_WAKE_BYTES", 1)
    if request.param == "pieces":
        monkeypatch.setattr(avx512_experts, "_TAKE_BYTES", 1000)
    if request.param == "slices":
        monkeypatch.setattr(avx512_experts, "_MEET_BYTES", -1)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_backend_equals_the_reference(
    threads: int, rows: int, k: int, dtype: torch.dtype, division: str
) -> None:
    ours, reference = _pair(threads)
    call = _call(rows, k, dtype=dtype)

    assert ours._own is not None, "the kernels are in use"
    out = ours.compute(*call)

    assert out.dtype == partial_dtype(dtype)
    assert_close(out, reference.compute(*call), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 300])
@pytest.mark.parametrize("threads", [1, 3])
def test_weights_in_bytes_compute_what_onednn_does(
    threads: int,
    rows: int,
    dtype: torch.dtype,
    division: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torch.cpu._is_vnni_supported():
        pytest.skip("needs AVX-512 VNNI")
    ours, reference = _pair(threads, "int8")
    call = _call(rows, 3, dtype=dtype)

    out = ours.compute(*call)

    monkeypatch.setattr(avx512_experts, "compile_kernels", lambda weights: None)
    expected = _pair(threads, "int8")[0].compute(*call)
    assert out.dtype == expected.dtype == partial_dtype(dtype)
    if rows:
        exact = reference.compute(*call)
        error, onednn_error = (relative_error(each, exact)[0] for each in (out, expected))
        assert error < min(ERROR, 1.05 * onednn_error)
        # Some values fall on the two sides of a step; and bfloat16 has steps of its own.
        assert relative_error(out, expected)[0] < (5e-3 if dtype == torch.bfloat16 else 2e-3)


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
    ours, reference = _pair(threads=2)
    layer, hidden, ids, weights = _call(rows, k, seed)
    hole = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < holes
    ids[hole], weights[hole] = -1, torch.nan  # nobody may read the weight of a hole
    expected = reference.compute(layer, hidden, ids, weights.nan_to_num())

    assert_close(ours.compute(layer, hidden, ids, weights), expected, torch.bfloat16)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_batch_needs_the_intermediates_of_a_piece_only(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avx512_experts, "_TAKE_BYTES", 1000)
    ours, reference = _pair(threads)
    taken: list[int] = []
    take = avx512_experts.Avx512Experts._take_h

    def counted(self: Any, first: int, places: int, width: int) -> Any:
        taken.append(places)
        return take(self, first, places, width)

    monkeypatch.setattr(avx512_experts.Avx512Experts, "_take_h", counted)
    call = _call(1000, 3)

    assert_close(ours.compute(*call), reference.compute(*call), torch.bfloat16)
    assert sum(taken) == 3000
    assert max(taken) <= 96


def test_more_pairs_of_a_row_than_are_kept_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avx512_experts, "_ROW_PAIRS", 3)
    ours, reference = _pair()
    for k in (3, 4):
        call = _call(1, k)
        assert_close(ours.compute(*call), reference.compute(*call), torch.bfloat16)


def test_a_row_has_the_same_bits_alone_and_in_any_batch(division: str) -> None:
    ours, _ = _pair(threads=2)
    layer, hidden, ids, weights = _call(100, 3)
    large = ours.compute(layer, hidden, ids, weights)

    for rows in (1, 2, 7, 33):
        small = ours.compute(layer, hidden[:rows], ids[:rows], weights[:rows])
        # Of a row that is alone, pairs are not added up in the order of their experts.
        assert_close(small, large[:rows], torch.bfloat16)
        if rows > 1:
            assert torch.equal(small, large[:rows])


def test_the_callers_rows_need_not_lie_side_by_side() -> None:
    ours, reference = _pair()
    layer, hidden, ids, weights = _call(9, 2)
    apart = torch.cat([hidden, hidden], dim=1)[:, :H]
    assert not apart.is_contiguous()

    out = ours.compute(layer, apart, ids, weights[:, :1].expand(-1, 2))

    expected = reference.compute(layer, hidden, ids, weights[:, :1].expand(-1, 2))
    assert_close(out, expected, torch.bfloat16)


@pytest.mark.parametrize(("hidden", "width"), [(48, 64), (64, 20), (17, 5), (64, 96)])
def test_sizes_that_are_no_blocks_are_left_to_onednn(hidden: int, width: int) -> None:
    assert OneDnnBackend(_spec(hidden, width), torch.bfloat16, 1)._own is None


def test_without_llvmlite_onednn_computes_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llvmlite" else find(name)
    )
    monkeypatch.setattr(avx512_experts, "compile_kernels", compile_kernels.__wrapped__)

    with pytest.warns(FallbackWarning, match="llvmlite is not installed"):
        backend = OneDnnBackend(_spec(), torch.bfloat16, 1)

    assert backend._own is None


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a CPU where oneDNN is faster for more than 4 rows: how many our kernels then got."""
    monkeypatch.setattr(avx512_experts, "compile_kernels", _compile_for_few)
    taken: list[int] = []
    compute = avx512_experts.Avx512Experts.compute

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        taken.append(len(arguments[1]))
        return compute(self, *arguments)

    monkeypatch.setattr(avx512_experts.Avx512Experts, "compute", counted)
    return taken


def _compile_for_few(weights: str) -> Kernels:
    library, _ = avx512._compile(weights, has_dot())
    return Kernels(library, most_rows=4)


@pytest.mark.parametrize("form", ["auto", "int8"])
def test_a_cpu_without_instructions_for_bfloat16_computes_the_same(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avx512_experts, "compile_kernels", _without_bf16)
    ours, reference = _pair(form=form)

    for rows in (1, 4, 40):
        call = _call(rows, 3)
        out, expected = ours.compute(*call), reference.compute(*call)
        assert relative_error(out, expected)[0] < (ERROR if form == "int8" else 1e-2)


@pytest.mark.parametrize("form", ["auto", "int8"])
def test_where_onednn_is_faster_for_more_rows_both_read_the_same_memory(
    form: str, few: list[int]
) -> None:
    ours, reference = _pair(form=form)
    for rows in (1, 4, 5, 40):
        call = _call(rows, 3)
        out, expected = ours.compute(*call), reference.compute(*call)
        assert relative_error(out, expected)[0] < (ERROR if form == "int8" else 1e-2)

    assert few == [1, 4]
    assert ours._own is not None
    at = ours._format.addresses(ours._experts[0][2])
    assert ours._blocks[0][2].matrices == at, "no copy of a matrix is kept"


def test_another_layout_of_onednn_is_noticed_and_left_to_it(
    few: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = _pair()
    pack = torch.ops.mkldnn._reorder_linear_weight
    weights = ExpertWeights(*(torch.randn(*shape) for shape in ((I, H), (I, H), (H, I))))
    # Packed from the other end: the same size, another order.
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda matrix, _: pack(matrix.flip(0), None)
    )

    with pytest.warns(FallbackWarning, match="packs in another layout"):
        ours.load(Slot(0, 0), weights)

    out = ours.compute(*_call(2, 3))
    assert few == []
    assert out.isfinite().all()


def test_a_dropped_expert_is_given_back_and_gone() -> None:
    backend, _ = _pair()
    held = backend._blocks[0][1]

    dropped = backend.drop(Slot(0, 1))

    assert dropped == (None, held)
    assert 1 not in backend._blocks[0]
    with pytest.raises(KeyError):
        backend.drop(Slot(0, 1))
