"""FP8 checkpoints: what stays in the model is dequantised exactly, partial blocks included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from expertmesh import CheckpointError, ConfigError
from expertmesh.huggingface import attach, load_without_experts
from tests.attached import both_gates, logits, relative_error
from tests.checkpoints import build_config, edit_config, edit_tensors, make_fp8_checkpoint
from tests.mesh import local_mesh

# Rows of kv_a_proj_with_mqa, and scale rows: transformers takes rows / scale rows for the block.
SHAPES: dict[str, dict[str, int]] = {
    "divides, wrongly": {"kv_lora_rank": 152, "qk_rope_head_dim": 8},  # 160 rows, 2 scales
    "does not divide": {"kv_lora_rank": 281, "qk_rope_head_dim": 8},  # 289 rows, 3 scales
}
SIZES = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 144}
KV = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"


@dataclass(frozen=True)
class Fp8:
    """A cluster that serves an FP8 checkpoint, and every weight of it as it should be read."""

    path: Path
    address: str
    weights: dict[str, torch.Tensor]
    reference: PreTrainedModel


@pytest.fixture(scope="module", params=SHAPES)
def fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fp8]:
    shape = SHAPES[request.param]
    path = tmp_path_factory.mktemp("fp8")
    weights = make_fp8_checkpoint(path, attention=True, **shape)
    config = build_config("deepseek_v3", **SIZES, **shape, n_routed_experts=8)
    reference = DeepseekV3ForCausalLM.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=torch.float32
    )
    with local_mesh(path, dtype="float32") as mesh:
        yield Fp8(path, mesh.address, weights, reference)


def test_the_two_shapes_are_what_they_are_called(fp8: Fp8) -> None:
    stored = load_file(fp8.path / "model.safetensors")
    rows, scales = stored[KV].shape[0], stored[KV + "_scale_inv"].shape[0]

    assert (rows, scales) in ((160, 2), (289, 3))


@both_gates
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float32", None], ids=str)
def test_what_stays_is_dequantised_exactly(fp8: Fp8, gate: Any, dtype: Any) -> None:
    asked = {} if dtype is None else {"dtype": dtype}
    model = load_without_experts(fp8.path, fp8.address, gate=gate, **asked)

    with model.expertmesh:
        found = logits(model)
    parameters = dict(model.named_parameters())
    assert KV in parameters
    assert (gate == "model") == any(".mlp.gate.weight" in name for name in parameters)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, fp8.weights[name].to(parameter.dtype)), name
    single = dtype in (torch.float32, "float32")
    assert model.dtype == found.dtype == (torch.float32 if single else torch.bfloat16)
    if single:
        assert relative_error(found, logits(fp8.reference)) <= 1e-5


@both_gates
def test_an_fp8_checkpoint_of_a_kimi_is_the_same(fp8: Fp8, gate: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(fp8.path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((fp8.path / "config.json").read_bytes())
    edit_config(tmp_path, model_type="kimi_k2")

    model = load_without_experts(tmp_path, fp8.address, gate=gate, dtype="float32")

    with model.expertmesh:
        assert relative_error(logits(model), logits(fp8.reference)) <= 1e-5


def test_the_checkpoint_s_way_to_generate_is_kept(fp8: Fp8, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).symlink_to(fp8.path / name)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 77, "max_length": 9}')

    model = load_without_experts(tmp_path, fp8.address)

    with model.expertmesh:
        assert model.generation_config.eos_token_id == 77
        assert model.config.name_or_path == str(tmp_path)


def test_scales_of_attention_that_do_not_fit_are_refused(fp8: Fp8, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((fp8.path / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((fp8.path / "model.safetensors").read_bytes())
    edit_tensors(tmp_path, **{KV + "_scale_inv": torch.ones(9, 9)})

    with pytest.raises(CheckpointError, match=rf"{KV}_scale_inv has shape \[9, 9\], expected"):
        load_without_experts(tmp_path, fp8.address)


def test_a_model_that_transformers_dequantised_wrongly_is_not_attached(
    tmp_path: Path,
) -> None:
    """It is silent only where rows divide: load_without_experts says what to do instead."""
    make_fp8_checkpoint(tmp_path, attention=True, **SHAPES["divides, wrongly"], **NO_RAGGED_MLP)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path)

    with local_mesh(tmp_path) as mesh:
        with pytest.raises(ConfigError, match=r"self_attn\.\w+\.weight was dequantised in blocks"):
            attach(model, mesh.address)
        assert model.state_dict()  # it is as it was


# Multiples of a block, which transformers reads rightly.
NO_RAGGED_MLP = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128}
NO_RAGGED_ATTENTION = {
    **NO_RAGGED_MLP,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 128,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@both_gates
def test_a_model_that_transformers_dequantised_rightly_is_attached(
    gate: Any, tmp_path: Path
) -> None:
    weights = make_fp8_checkpoint(tmp_path, attention=True, **NO_RAGGED_ATTENTION)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path)

    with local_mesh(tmp_path) as mesh, attach(model, mesh.address, gate=gate):
        assert logits(model).isfinite().all()

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].to(parameter.dtype)), name


def test_a_scheme_without_a_routine_of_its_own_needs_the_cluster_to_gate(
    fp8: Fp8, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((fp8.path / "config.json").read_bytes())
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})

    with pytest.raises(ConfigError, match=re.escape("use gate='cluster'")):
        load_without_experts(tmp_path, fp8.address, gate="model")
