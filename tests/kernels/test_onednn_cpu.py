"""What the onednn backend takes where a CPU or a torch lacks something: never nothing."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from expert_service.kernels.cpu import onednn_cpu, onednn_formats
from expert_service.kernels.cpu.onednn import OneDnnBackend
from expert_service.kernels.cpu.onednn_cpu import FallbackWarning
from expert_service.kernels.reference import ReferenceBackend
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot
from tests.kernels.tolerances import assert_close

SPEC = ModelSpec(
    model_type="test",
    hidden_size=48,
    dtype=torch.bfloat16,
    layers=(
        LayerSpec(
            index=0,
            num_experts=1,
            intermediate_size=20,
            shared_intermediate_size=0,
            gate=GateSpec(score="softmax", top_k=1),
        ),
    ),
)


def _no() -> bool:
    return False


def _computes_as_the_reference(backend: OneDnnBackend, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 48), (20, 48), (48, 20))
    expert = ExpertWeights(
        *((torch.randn(n, k, generator=generator) / k**0.5).to(dtype) for n, k in shapes)
    )
    reference = ReferenceBackend()
    for each in (backend, reference):
        each.load(Slot(0, 0), expert)
        each.finish_loading()
    ids, weights = torch.zeros(9, 1, dtype=torch.int32), torch.rand(9, 1, generator=generator)
    call = (0, torch.randn(9, 48, generator=generator).to(dtype), ids, weights)
    assert_close(backend.compute(*call), reference.compute(*call), dtype)


def test_without_packed_ops_plain_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())

    with pytest.warns(FallbackWarning, match="lacks oneDNN's packed linear operators"):
        backend = OneDnnBackend(SPEC, torch.bfloat16, threads=1)

    _computes_as_the_reference(backend, torch.bfloat16)


def test_experts_take_the_memory_of_what_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    in_float32 = OneDnnBackend(SPEC, torch.float32, threads=1)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", _no)
    with pytest.warns(FallbackWarning, match="float32 is used"):
        fallen_back = OneDnnBackend(SPEC, torch.bfloat16, threads=1)
    monkeypatch.setattr(onednn_formats, "can_int8", lambda instead: True)
    in_int8 = OneDnnBackend(SPEC, torch.float32, threads=1, weights="int8")

    assert in_float32.host_footprint(100, torch.float32) == 400
    assert fallen_back.host_footprint(100, torch.bfloat16) == 400
    assert in_int8.host_footprint(100, torch.float32) == 100
    assert ReferenceBackend().host_footprint(100, torch.bfloat16) == 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cpu_without_a_dtype_computes_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, _no)

    with pytest.warns(FallbackWarning, match=f"cannot compute in {dtype}: float32 is used"):
        backend = OneDnnBackend(SPEC, dtype, threads=1)

    assert backend._format.dtype == torch.float32
    _computes_as_the_reference(backend, dtype)


@pytest.mark.parametrize("lacks", ["operators", "instructions"])
def test_without_what_int8_needs_weights_stay_wide(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "operators":
        monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace())
    else:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", _no)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", _no)

    with pytest.warns(FallbackWarning, match="weights are kept in torch.float32, not in int8"):
        backend = OneDnnBackend(SPEC, torch.float32, threads=1, weights="int8")

    assert backend.name == "onednn/cpu"
    _computes_as_the_reference(backend, torch.float32)


def test_a_fallback_is_said_once_however_many_backends_there_are() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            onednn_cpu.fall_back("this test asked for it")

    assert [str(each.message) for each in caught] == ["onednn falls back: this test asked for it"]


def test_this_cpu_needs_no_fallback_for_float32() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = OneDnnBackend(SPEC, torch.float32, threads=1)

    _computes_as_the_reference(backend, torch.float32)
