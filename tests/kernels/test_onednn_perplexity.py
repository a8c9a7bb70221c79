"""What int8 weights cost a whole model: bits per byte of the example, all of its FFNs in int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from examples.tiny_deepseek import corpus
from examples.tiny_deepseek.evaluate import measure
from expert_service.kernels.cpu.onednn import OneDnnBackend
from expert_service.kernels.cpu.onednn_cpu import has_int8_instructions, has_int8_ops
from expertmesh.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(
    not (has_int8_ops() and has_int8_instructions()), reason="falls back here: test_onednn_cpu"
)
FOLDER = Path(__file__).parents[2] / "examples" / "tiny_deepseek"


class _Served(torch.nn.Module):
    """One expert of a backend on all rows, in place of a dense or shared MLP."""

    def __init__(self, backend: OneDnnBackend, layer: int, expert: int) -> None:
        super().__init__()
        self._call = (backend, layer, expert)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        backend, layer, expert = self._call
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        ids = torch.full((len(x_TH), 1), expert, dtype=torch.int32)
        return backend.compute(layer, x_TH, ids, torch.ones(len(x_TH), 1)).view(hidden.shape)


class _ServedExperts(torch.nn.Module):
    """The routed experts of a layer, computed by a backend."""

    def __init__(self, backend: OneDnnBackend, layer: int) -> None:
        super().__init__()
        self._call = (backend, layer)

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        backend, layer = self._call
        return backend.compute(layer, hidden, ids.to(torch.int32), weights.float())


def _model(weights: str | None) -> DeepseekV3ForCausalLM:
    """The example; with `weights`, its dense, shared and routed experts in an onednn backend."""
    model = DeepseekV3ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    if weights is None:
        return model
    with Checkpoint.open(FOLDER) as checkpoint:
        backend = OneDnnBackend(checkpoint.spec, torch.float32, 1, weights)
        for layer in checkpoint.spec.layers:
            for slot in layer.slots():
                backend.load(slot, checkpoint.read_expert(slot, torch.float32))
            block = model.model.layers[layer.index]
            shared = _Served(backend, layer.index, layer.shared_id)
            if layer.kind == "dense":
                block.mlp = shared
            else:
                block.mlp.experts, block.mlp.shared_experts = (
                    _ServedExperts(backend, layer.index),
                    shared,
                )
    return model


@pytest.mark.parametrize(
    ("weights", "bound"), [("auto", 1e-4), ("int8", 5e-3)], ids=["float32", "int8"]
)
def test_the_examples_bits_per_byte_hardly_change(weights: str, bound: float) -> None:
    windows = corpus.windows(corpus.load(held_out=True))[::40]
    expected = measure(_model(None), windows).bits_per_byte

    served = measure(_model(weights), windows).bits_per_byte

    assert abs(served - expected) < bound
