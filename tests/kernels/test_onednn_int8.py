"""The onednn backend with int8 weights: how far it is from float32, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import relative_error
from expert_service.kernels import create_backend
from expert_service.kernels.cpu.onednn import OneDnnBackend
from expert_service.kernels.cpu.onednn_cpu import has_int8_instructions, has_int8_ops
from expert_service.kernels.cpu.onednn_formats import Int8Format
from expert_service.kernels.reference import ReferenceBackend
from expertmesh.errors import ConfigError
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot

pytestmark = pytest.mark.skipif(
    not (has_int8_ops() and has_int8_instructions()), reason="falls back here: test_onednn_cpu"
)
EXPERTS = 8
#: Norm of what 8 bits in weights, rows and intermediate change, relative to the result.
ERROR = 4e-2


def _spec(hidden: int, width: int) -> ModelSpec:
    layer = LayerSpec(
        index=0,
        num_experts=EXPERTS,
        intermediate_size=width,
        shared_intermediate_size=0,
        gate=GateSpec(score="softmax", top_k=2),
    )
    return ModelSpec(model_type="test", hidden_size=hidden, dtype=torch.bfloat16, layers=(layer,))


def _expert(hidden: int, width: int, seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    return ExpertWeights(matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))


@pytest.fixture(params=[96, 128], ids=["onednn", "own"])
def width(request: pytest.FixtureRequest) -> int:
    """One that is oneDNN's, and one, of whole blocks, that is our kernels' where there are any."""
    return int(request.param)


def _pair(hidden: int, width: int) -> tuple[OneDnnBackend, ReferenceBackend]:
    spec = _spec(hidden, width)
    int8, reference = OneDnnBackend(spec, torch.bfloat16, 1, "int8"), ReferenceBackend()
    for expert in range(EXPERTS):
        weights = _expert(hidden, width, seed=expert)
        int8.load(Slot(0, expert), weights)
        reference.load(Slot(0, expert), weights)
    int8._x.take(256, torch.float32).fill_(torch.nan)
    int8._y.take(2048, torch.float32).fill_(torch.nan)
    if int8._own is not None:
        for buffer in int8._own._y.values():
            buffer.take(2048, hidden)
            buffer._values.fill_(torch.nan)
    return int8, reference


def _call(
    rows: int, k: int, hidden: int = 256, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(dim=1)[:, :k].to(torch.int32)
    x_RH = torch.randn(rows, hidden, generator=generator).to(dtype)
    return x_RH, ids, torch.rand(rows, k, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 63, 400])
def test_int8_is_near_float32(width: int, rows: int, dtype: torch.dtype) -> None:
    int8, reference = _pair(256, width)
    x_RH, ids, weights = _call(rows, 3, dtype=dtype)

    out = int8.compute(0, x_RH, ids, weights)

    assert relative_error(out, reference.compute(0, x_RH, ids, weights))[0] < ERROR


@pytest.mark.parametrize(("hidden", "width"), [(48, 20), (17, 5), (64, 32)])
def test_any_size_of_expert_works_in_int8(hidden: int, width: int) -> None:
    int8, reference = _pair(hidden, width)
    int8.finish_loading()
    call = _call(50, 2, hidden)

    assert relative_error(int8.compute(0, *call), reference.compute(0, *call))[0] < 1.5 * ERROR


def test_no_row_gives_no_row_and_asking_nobody_gives_zeros(width: int) -> None:
    int8, _ = _pair(256, width)
    nobody = torch.full((3, 2), -1, dtype=torch.int32)

    assert int8.compute(0, *_call(0, 2)).shape == (0, 256)
    assert not int8.compute(0, torch.randn(3, 256), nobody, torch.ones(3, 2)).any()


def test_a_row_alone_is_as_in_a_batch(width: int) -> None:
    """Rows are rounded by themselves: their neighbours, however large, do not coarsen them."""
    int8, _ = _pair(256, width)
    x_RH, ids, weights = _call(40, 3)
    alone = int8.compute(0, x_RH[:1], ids[:1], weights[:1])
    x_RH[1:] *= 1e4

    among = int8.compute(0, x_RH, ids, weights)

    assert relative_error(among[:1], alone)[0] < 1e-6


def test_scaled_rows_give_no_other_error(width: int) -> None:
    """A row's scale is its own: tiny and huge ones are as exact as any."""
    int8, reference = _pair(256, width)
    x_RH, ids, weights = _call(6, 2)
    x_RH *= torch.tensor([1e-12, 1e-4, 1.0, 1e2, 1e4, 1e6])[:, None]

    out, expected = (each.compute(0, x_RH, ids, weights) for each in (int8, reference))

    for row in range(6):
        assert relative_error(out[row : row + 1], expected[row : row + 1])[0] < 2 * ERROR


def test_a_row_of_zeros_gives_zeros(width: int) -> None:
    int8, _ = _pair(256, width)
    x_RH, ids, weights = _call(5, 2)
    x_RH[3] = 0

    out = int8.compute(0, x_RH, ids, weights)

    assert not out[3].any()
    assert out[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(width: int, value: float) -> None:
    int8, _ = _pair(256, width)
    x_RH, ids, weights = _call(10, 3)
    x_RH[4, 7] = value

    out = int8.compute(0, x_RH, ids, weights)

    assert not out[4].isfinite().any()
    assert out[[row for row in range(10) if row != 4]].isfinite().all()


def test_int8_takes_half_the_bytes_of_bfloat16() -> None:
    expert = _expert(256, 128, seed=0)  # whole blocks of 64: oneDNN fills up others

    matrices = Int8Format().pack(expert, lambda: None)

    packed = sum(torch.ops.mkldnn._nbytes(matrix.values) for matrix in matrices)
    scales = sum(matrix.scale.nbytes for matrix in matrices)
    assert packed <= 1.03 * sum(matrix.numel() for matrix in expert)  # and a word a channel
    assert scales == 4 * (128 + 128 + 256)


def test_a_channel_of_zeros_does_not_spoil_the_others() -> None:
    spec, expert = _spec(256, 96), _expert(256, 96, seed=0)
    expert.gate[5] = 0
    expert.down[9] = 0
    int8, reference = OneDnnBackend(spec, torch.bfloat16, 1, "int8"), ReferenceBackend()
    for backend in (int8, reference):
        backend.load(Slot(0, 0), expert)
    call = (torch.randn(4, 256), torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1))

    out = int8.compute(0, *call)

    assert not out[:, 9].any()
    assert relative_error(out, reference.compute(0, *call))[0] < ERROR


def test_int8_is_chosen_by_name_and_says_so() -> None:
    spec = _spec(256, 96)

    backend = create_backend("auto", "cpu", torch.bfloat16, spec, threads=1, weights="int8")

    assert backend.name == "onednn-int8/cpu"


@pytest.mark.parametrize("name", ["reference", "noop", "triton"])
def test_another_backend_refuses_int8(name: str) -> None:
    with pytest.raises(ConfigError, match="onednn"):
        create_backend(name, "cpu", torch.bfloat16, _spec(256, 96), threads=1, weights="int8")
