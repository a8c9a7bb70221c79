"""From merged requests to pairs, in each dtype that requests have, without code of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertmesh import gating
from expertmesh.codec.messages import ForwardRequest
from expertmesh.model import GateSpec, GateWeights, LayerSpec
from router_service.routing import route_batch

H, E, K = 8, 6, 2
SPECS = {
    "logits in float32": GateSpec(score="sigmoid", top_k=K, logits_float32=True),
    "logits in the caller's dtype": GateSpec(score="softmax", top_k=K, round_weights=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("rows", [1, gating._FEW_SCORES // E, gating._FEW_SCORES // E + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_of_each_dtype_are_gated_and_sampled(
    dtype: torch.dtype, rows: int, spec: GateSpec
) -> None:
    generator = torch.Generator().manual_seed(rows)
    layer = LayerSpec(
        index=0, num_experts=E, intermediate_size=4, shared_intermediate_size=0, gate=spec
    )
    weight = torch.randn(E, H, generator=generator)
    gate = GateWeights(weight, torch.linspace(-0.5, 0.5, E), None)
    hidden = torch.randn(rows, H, generator=generator).to(dtype)
    sampled = np.arange(0, rows, 3)

    batch = route_batch(
        [ForwardRequest(layer=0, hidden_states=hidden)], layer, gate, gate.bias, sampled
    )

    expected = gating.route(hidden, gate, spec, gate.bias)
    scores = gating.scores(gating.logits(hidden, gate, spec), spec)
    assert torch.equal(torch.from_numpy(batch.expert_ids), expected.expert_ids)
    assert torch.equal(torch.from_numpy(batch.weights), expected.weights)
    assert batch.sample is not None
    assert torch.equal(batch.sample.scores, scores[::3])
    assert torch.equal(batch.sample.expert_ids, expected.expert_ids[::3])
