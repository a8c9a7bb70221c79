"""A model whose feed-forward weights changed since it was loaded is not attached in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from expertmesh import ConfigError
from expertmesh.huggingface import attach
from tests.attached import Served, both_gates, generate, logits, relative_error, serve
from tests.checkpoints import make_fp8_checkpoint
from tests.mesh import local_mesh


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Layer 1 is dense; layers 0 and 2 have routed experts, and a shared one."""
    with serve("qwen2_moe", tmp_path_factory.mktemp("qwen")) as found:
        yield found


def load(path: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return model


@torch.no_grad()
def merge(model: Any, name: str) -> None:
    """As an adapter of rank 1 is merged into a weight."""
    weight = model.get_parameter(name)
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(size, generator=generator) for size in weight.shape[-2:])
    weight += 0.02 * torch.outer(a, b).to(weight.dtype)


@both_gates
@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts has other weights"),
        ("model.layers.2.mlp.experts.down_proj", "model.layers.2.mlp.experts has other weights"),
        ("model.layers.2.mlp.shared_expert.up_proj.weight", "2.mlp.shared_expert has other weigh"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp has other weights"),
    ],
)
def test_an_adapter_that_was_merged_is_noticed(
    qwen: Served, gate: Any, weight: str, says: str
) -> None:
    model = load(qwen.path)
    merge(model, weight)

    with pytest.raises(ConfigError, match=re.escape(says)):
        attach(model, qwen.address, gate=gate)

    assert model.state_dict()  # nothing of it was replaced


@pytest.mark.parametrize("name", ["gate", "shared_expert_gate"])
def test_a_gate_that_was_trained_is_noticed_where_the_cluster_gates(
    qwen: Served, name: str
) -> None:
    model = load(qwen.path)
    merge(model, f"model.layers.2.mlp.{name}.weight")

    with pytest.raises(ConfigError, match=rf"model\.layers\.2\.mlp\.{name} has other weights"):
        attach(model, qwen.address)


def test_a_gate_that_was_trained_gates_where_the_model_gates(qwen: Served) -> None:
    model = load(qwen.path)
    merge(model, "model.layers.2.mlp.gate.weight")
    expected = logits(model)

    with attach(model, qwen.address, gate="model"):
        assert relative_error(logits(model), expected) <= 1e-5


@both_gates
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_as_it_was_loaded_is_attached_in_any_dtype(
    qwen: Served, gate: Any, dtype: torch.dtype
) -> None:
    model = load(qwen.path, dtype=dtype)

    with attach(model, qwen.address, gate=gate):
        if dtype == torch.float32:
            assert torch.equal(generate(model), qwen.text)


def test_a_model_that_went_through_bfloat16_is_attached(qwen: Served) -> None:
    model = load(qwen.path, dtype=torch.bfloat16).float()

    attach(model, qwen.address).close()


@both_gates
def test_an_adapter_merged_into_attention_is_none_of_the_cluster_s_business(
    qwen: Served, gate: Any
) -> None:
    model = load(qwen.path)
    merge(model, "model.layers.0.self_attn.q_proj.weight")

    attach(model, qwen.address, gate=gate).close()


def test_weights_of_an_fp8_checkpoint_are_compared_dequantised(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128}
    make_fp8_checkpoint(tmp_path, **sizes)

    with local_mesh(tmp_path) as mesh:
        attach(load(tmp_path), mesh.address).close()
        changed = load(tmp_path)
        merge(changed, "model.layers.1.mlp.shared_experts.gate_proj.weight")
        with pytest.raises(ConfigError, match=r"1\.mlp\.shared_experts has other weights"):
            attach(changed, mesh.address)
