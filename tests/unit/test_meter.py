"""The divergence meter of a router: what it samples, what it measures, what it costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertmesh.codec.messages import ForwardRequest
from expertmesh.config import RouterConfig
from expertmesh.model import GateSpec, GateWeights, LayerSpec, ModelSpec
from router_service.meter import DivergenceMeter
from router_service.routing import route_batch
from router_service.snapshot import Model

EXPERTS, HIDDEN = 8, 4


def _layer(index: int) -> LayerSpec:
    return LayerSpec(
        index=index,
        num_experts=EXPERTS,
        intermediate_size=2,
        shared_intermediate_size=0,
        gate=GateSpec(score="sigmoid", top_k=2),
    )


def _gate() -> GateWeights:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, HIDDEN, generator=generator)
    return GateWeights(weight, torch.zeros(EXPERTS), None)


def _meter(layers: int = 1, **config: int) -> DivergenceMeter:
    spec = ModelSpec(
        model_type="t",
        hidden_size=HIDDEN,
        dtype=torch.float32,
        layers=tuple(_layer(index) for index in range(layers)),
    )
    model = Model(spec, {index: _gate() for index in range(layers)}, "digest", torch.float32)
    return DivergenceMeter(model, RouterConfig(**config))


def _serve(meter: DivergenceMeter, bias: torch.Tensor, rows: int = 64, layer: int = 0) -> None:
    """One batch under a serving bias, sampled as a router does."""
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    sampled = meter.rows(layer, rows)
    request = ForwardRequest(layer=layer, hidden_states=hidden)
    batch = route_batch([request], _layer(layer), _gate(), bias, sampled)
    if batch.sample is not None:
        meter.take(layer, batch.sample)


def test_what_the_trained_bias_serves_does_not_diverge() -> None:
    meter = _meter()
    _serve(meter, torch.zeros(EXPERTS))

    (sample,) = meter.measure(meter.drain())

    assert sample.changed_picks == 0
    assert sample.sampled_picks == 2 * 64
    assert meter.share() == 0.0


def test_a_bias_that_forces_one_expert_changes_what_others_would_have_got() -> None:
    meter = _meter()
    forced = torch.zeros(EXPERTS)
    forced[5] = 10.0
    scores = torch.sigmoid(
        torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(64)) @ _gate().weight.T
    )
    would_not = int((scores.topk(2).indices != 5).all(1).sum())

    _serve(meter, forced)
    (sample,) = meter.measure(meter.drain())

    assert 0 < would_not < 64
    assert sample.changed_picks == would_not
    assert meter.share() == pytest.approx(would_not / 128)


def test_counts_of_picks_are_totals_and_scores_are_of_the_rows_since_the_last_report() -> None:
    meter = _meter()
    _serve(meter, torch.zeros(EXPERTS), rows=10)
    first = meter.measure(meter.drain())[0]
    _serve(meter, torch.zeros(EXPERTS), rows=7)
    second = meter.measure(meter.drain())[0]

    assert (first.sampled_picks, second.sampled_picks) == (20, 34)
    assert (list(first.scores.shape), list(second.scores.shape)) == ([10, 8], [7, 8])


def test_scores_on_the_wire_are_those_before_any_bias() -> None:
    meter = _meter()
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3))

    _serve(meter, torch.full((EXPERTS,), 0.25), rows=3)
    (sample,) = meter.measure(meter.drain())

    scores = np.frombuffer(sample.scores.data, np.float32).reshape(3, EXPERTS)
    expected = torch.sigmoid(hidden @ _gate().weight.T).numpy()
    np.testing.assert_allclose(np.sort(scores, 0), np.sort(expected, 0), rtol=1e-6)


def test_what_is_sampled_between_two_reports_is_bounded_in_rows() -> None:
    meter = _meter(sample_rows=100)
    for _ in range(50):
        _serve(meter, torch.zeros(EXPERTS), rows=80)

    drained = meter.drain()

    assert len(drained[0].scores) == 100
    assert len(meter.rows(0, 80)) > 0, "the next report has room again"


def test_what_is_sampled_between_two_reports_is_bounded_in_bytes_over_all_layers() -> None:
    meter = _meter(layers=4, sample_bytes=4 * 4 * EXPERTS * 20)
    for layer in range(4):
        for _ in range(20):
            _serve(meter, torch.zeros(EXPERTS), layer=layer)

    reported = meter.measure(meter.drain())

    assert sum(len(sample.scores.data) for sample in reported) == 4 * 4 * EXPERTS * 20


def test_one_batch_does_not_speak_for_a_whole_report() -> None:
    assert len(_meter(sample_rows=100).rows(0, 10_000)) == 25


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1000])
def test_sampled_rows_are_distinct_rows_of_the_batch(rows: int) -> None:
    sampled = _meter().rows(0, rows)

    assert len(sampled) == min(rows, 64)
    assert len(set(sampled.tolist())) == len(sampled)
    assert set(sampled.tolist()) <= set(range(rows))


def test_rows_whose_caller_gated_are_not_sampled() -> None:
    own = ForwardRequest(layer=0, hidden_states=torch.ones(2, HIDDEN))
    gated = ForwardRequest(
        layer=0,
        hidden_states=torch.ones(3, HIDDEN),
        expert_ids=torch.zeros(3, 1, dtype=torch.int32),
        expert_weights=torch.ones(3, 1),
    )

    batch = route_batch([gated, own], _layer(0), _gate(), torch.zeros(EXPERTS), np.arange(5))

    assert batch.sample is not None
    assert len(batch.sample.scores) == 2
    np.testing.assert_array_equal(batch.sample.expert_ids.numpy(), batch.expert_ids[3:])
