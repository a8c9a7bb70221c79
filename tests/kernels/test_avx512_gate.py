"""The gate in code of our own, against `expertmesh.gating`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import gating
from expertmesh.checkpoint import Checkpoint
from expertmesh.codec.messages import ForwardRequest
from expertmesh.kernels.compiling import has_compiler, has_dot
from expertmesh.model import GateSpec, GateWeights, LayerSpec
from router_service.kernels.avx512_gate import Avx512Gate, create_avx512_gate
from router_service.routing import route_batch
from router_service.server import read_model
from tests.checkpoints import make_checkpoint
from tests.gates import V3

pytestmark = pytest.mark.skipif(
    not has_dot() or not has_compiler(), reason="needs AVX-512 BF16 and llvmlite"
)
HIDDEN = 96
#: (experts, spec): DeepSeek-V3, -V2-Lite, V2 with its groups, Qwen2-MoE, Mixtral, Kimi-K2.
FAMILIES = {
    "v3": (256, replace(V3, logits_float32=True)),
    "v2-lite": (64, GateSpec(score="softmax", top_k=6, logits_float32=True)),
    "v2": (
        128,
        GateSpec(
            score="softmax", top_k=6, n_group=8, topk_group=3, scale=16.0, logits_float32=True
        ),
    ),
    "qwen": (60, GateSpec(score="softmax", top_k=4, round_weights=True)),
    "mixtral": (8, GateSpec(score="softmax", top_k=2, renormalize=True)),
    "kimi": (384, GateSpec(score="sigmoid", top_k=8, renormalize=True, logits_float32=True)),
}


@pytest.fixture(params=FAMILIES, name="family")
def fixture_family(request: pytest.FixtureRequest) -> tuple[Avx512Gate, GateWeights, GateSpec]:
    experts, spec = FAMILIES[request.param]
    return _gate(experts, spec)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _gate(experts: int, spec: GateSpec) -> tuple[Avx512Gate, GateWeights, GateSpec]:
    generator = torch.Generator().manual_seed(experts)
    weight = (torch.randn(experts, HIDDEN, generator=generator) / HIDDEN**0.5).bfloat16()
    bias = torch.randn(experts, generator=generator) * 0.05
    gate = GateWeights(weight.float() if spec.logits_float32 else weight, bias, None)
    kernel = create_avx512_gate(gate, spec)
    assert kernel is not None
    return kernel, gate, spec


def _rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _assert_same(routing: gating.Routing, expected: gating.Routing, exact: float = 1e-6) -> None:
    """The same experts, in any order, with the same weights."""
    order, wanted = routing.expert_ids.sort(1), expected.expert_ids.sort(1)
    torch.testing.assert_close(order.values, wanted.values, rtol=0, atol=0)
    torch.testing.assert_close(
        routing.weights.gather(1, order.indices),
        expected.weights.gather(1, wanted.indices),
        rtol=exact,
        atol=1e-9,
    )


def _selected(logits: torch.Tensor, spec: GateSpec, bias: torch.Tensor | None) -> gating.Routing:
    """What the reference chooses from the same logits."""
    return gating.select(logits if spec.logits_float32 else logits.bfloat16(), spec, bias)


@pytest.mark.parametrize("rows", [1, 6, 7, 24, 25, 96, 97, 210])
def test_rows_choose_as_the_reference_does(
    family: tuple[Avx512Gate, GateWeights, GateSpec], rows: int
) -> None:
    kernel, gate, spec = family
    hidden = _rows(rows, seed=rows)

    logits, routing = kernel.route(hidden, gate.bias)

    expected = hidden.float() @ gate.weight.float().T
    if spec.logits_float32:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(logits, logits.bfloat16().float(), rtol=0, atol=0)
        torch.testing.assert_close(logits, expected, rtol=2**-7, atol=1e-3)
    assert routing.expert_ids.dtype == torch.int32
    _assert_same(routing, _selected(logits, spec, gate.bias), 1e-6 if spec.logits_float32 else 8e-3)


def test_a_bias_selects_and_never_weighs(
    family: tuple[Avx512Gate, GateWeights, GateSpec],
) -> None:
    kernel, gate, spec = family
    hidden = _rows(5)
    bias = torch.zeros(len(gate.bias))
    bias[3] = 5.0

    logits, routing = kernel.route(hidden, bias)
    plain_logits, plain = kernel.route(hidden, None)

    assert (routing.expert_ids == 3).any(1).all()
    assert torch.equal(logits, plain_logits)
    _assert_same(plain, _selected(logits, spec, None), 8e-3)
    _assert_same(routing, _selected(logits, spec, bias), 8e-3)


def test_equals_are_chosen_in_the_order_of_their_indices(
    family: tuple[Avx512Gate, GateWeights, GateSpec],
) -> None:
    kernel, gate, spec = family
    hidden = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)

    _, routing = kernel.route(hidden, torch.zeros(len(gate.bias)))

    kept = spec.topk_group * len(gate.bias) // spec.n_group
    assert spec.top_k <= kept
    assert routing.expert_ids.tolist() == [list(range(spec.top_k))] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_disturbs_no_other(
    family: tuple[Avx512Gate, GateWeights, GateSpec], bad: float
) -> None:
    kernel, gate, spec = family
    hidden = _rows(9)
    _, clean = kernel.route(hidden, gate.bias)
    hidden[4, 5] = bad

    logits, routing = kernel.route(hidden, gate.bias)

    assert not torch.isfinite(logits[4]).any()
    ids = routing.expert_ids[4]
    assert len(set(ids.tolist())) == spec.top_k
    assert int(ids.min()) >= 0
    assert int(ids.max()) < len(gate.bias)
    others = torch.arange(9) != 4
    assert torch.equal(routing.expert_ids[others], clean.expert_ids[others])
    assert torch.equal(routing.weights[others], clean.weights[others])


def test_nan_does_not_become_a_weight_that_looks_right() -> None:
    for experts, spec in FAMILIES.values():
        kernel, gate, _ = _gate(experts, spec)
        hidden = _rows(2)
        hidden[1] = torch.nan

        _, routing = kernel.route(hidden, gate.bias)

        assert routing.weights[0].isfinite().all()
        assert routing.weights[1].isnan().all()


def test_threads_change_nothing(
    family: tuple[Avx512Gate, GateWeights, GateSpec], one_thread: None
) -> None:
    kernel, gate, _ = family
    hidden = _rows(1000)
    logits, alone = kernel.route(hidden, gate.bias)
    torch.set_num_threads(3)

    shared_logits, shared = kernel.route(hidden, gate.bias)

    assert torch.equal(logits, shared_logits)
    assert torch.equal(alone.expert_ids, shared.expert_ids)
    assert torch.equal(alone.weights, shared.weights)


def test_rows_may_lie_apart_and_anywhere() -> None:
    kernel, gate, _ = _gate(*FAMILIES["v3"])
    hidden = _rows(7)
    apart = torch.zeros(7, HIDDEN + 3, dtype=torch.bfloat16)[:, 1 : HIDDEN + 1].copy_(hidden)

    assert kernel.takes(apart)
    _, routing = kernel.route(apart, gate.bias)

    assert torch.equal(routing.expert_ids, kernel.route(hidden, gate.bias)[1].expert_ids)


@st.composite
def _specs(draw: st.DrawFn) -> tuple[int, GateSpec]:
    groups = draw(st.sampled_from([1, 2, 4, 16]))
    size = draw(st.sampled_from([16, 32])) if groups > 1 else draw(st.integers(1, 130))
    kept = draw(st.integers(1, groups))
    return groups * size, GateSpec(
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        top_k=draw(st.integers(1, min(12, kept * size))),
        n_group=groups,
        topk_group=kept,
        group_score=draw(st.sampled_from(["max", "top2_sum"])) if groups > 1 else "max",
        renormalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        logits_float32=True,
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(_specs(), st.integers(1, 30))
def test_any_spec_chooses_as_the_reference_does(given_: tuple[int, GateSpec], rows: int) -> None:
    experts, spec = given_
    gating.check_gate(spec, experts)
    kernel, gate, _ = _gate(experts, spec)

    logits, routing = kernel.route(_rows(rows), gate.bias)

    _assert_same(routing, _selected(logits, spec, gate.bias))


def test_a_batch_is_routed_and_sampled_alike_with_and_without() -> None:
    experts, spec = FAMILIES["v3"]
    kernel, gate, _ = _gate(experts, spec)
    layer = LayerSpec(
        index=3,
        num_experts=experts,
        intermediate_size=64,
        shared_intermediate_size=0,
        gate=spec,
    )
    requests = [ForwardRequest(layer=3, hidden_states=_rows(each, each)) for each in (4, 9)]
    sampled = np.array([2, 5], np.int64)

    plain = route_batch(requests, layer, gate, gate.bias, sampled)
    ours = route_batch(requests, layer, gate, gate.bias, sampled, kernel)

    for each in (plain, ours):
        assert each.sample is not None
    _assert_same(
        gating.Routing(torch.from_numpy(ours.expert_ids), torch.from_numpy(ours.weights)),
        gating.Routing(torch.from_numpy(plain.expert_ids), torch.from_numpy(plain.weights)),
        1e-5,
    )
    torch.testing.assert_close(ours.sample.scores, plain.sample.scores, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    assert torch.equal(
        ours.sample.expert_ids,  # type: ignore[union-attr]
        torch.from_numpy(ours.expert_ids)[sampled],
    )


def test_what_it_is_not_for_is_left_to_the_reference() -> None:
    kernel, _, spec = _gate(*FAMILIES["mixtral"])
    assert not kernel.takes(_rows(3).float())
    assert not kernel.takes(_rows(3)[:, ::2])
    assert kernel.takes(_rows(3))
    assert not kernel.takes(_rows(1000)), "oneDNN multiplies many rows in bfloat16"
    few, _, _ = _gate(8, GateSpec(score="softmax", top_k=2, logits_float32=True))
    assert not few.takes(_rows(1000)), "seven eighths of a block would be padding"
    assert _gate(*FAMILIES["v3"])[0].takes(_rows(1000))

    def create(weight: torch.Tensor, spec: GateSpec) -> Avx512Gate | None:
        return create_avx512_gate(GateWeights(weight, torch.zeros(len(weight)), None), spec)

    fine = torch.randn(64, HIDDEN).bfloat16()
    assert create(fine, spec) is not None
    assert create(fine.float() + 1e-4, spec) is None, "more digits than bfloat16 has"
    assert create(fine[:, 1:], spec) is None, "an odd number of inputs"
    assert create(torch.zeros(576, 4).bfloat16(), spec) is None
    grouped = GateSpec(score="softmax", top_k=2, n_group=8, topk_group=3)
    assert create(torch.zeros(160, 4).bfloat16(), grouped) is None, "groups of 20"
    grouped = GateSpec(score="softmax", top_k=2, n_group=32, topk_group=3)
    assert create(torch.zeros(512, 4).bfloat16(), grouped) is None, "32 groups"


def test_without_llvmlite_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llvmlite" else find(name)
    )
    gate = GateWeights(torch.zeros(256, 8), torch.zeros(256), None)

    assert create_avx512_gate(gate, V3) is None


def test_a_router_has_it_for_every_layer_in_bfloat16(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    with Checkpoint.open(tmp_path) as checkpoint:
        model = read_model(checkpoint)

    assert set(model.kernels) == set(model.gates)
