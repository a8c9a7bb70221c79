"""What cannot be served is refused when it is opened, naming the file and the tensor or key."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.errors import CheckpointError
from expertmesh.model import Slot
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint, make_fp8_checkpoint

UP = "model.layers.1.mlp.experts.2.up_proj.weight"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each kind of checkpoint; tests spoil copies."""
    path = tmp_path_factory.mktemp("originals")
    make_checkpoint("deepseek_v3", path / "deepseek")
    make_checkpoint("deepseek_v3", path / "sharded", max_shard_size="100KB")
    make_fp8_checkpoint(path / "fp8")
    return path


@pytest.fixture
def deepseek(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "deepseek", tmp_path / "deepseek"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


@pytest.fixture
def fp8(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "fp8", tmp_path / "fp8"))


def assert_refused(path: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(path)


def test_an_unknown_family_is_refused_with_the_list_of_the_known(deepseek: Path) -> None:
    edit_config(deepseek, model_type="gpt_oss")

    assert_refused(deepseek, "model_type 'gpt_oss' is not served; served: deepseek_v2, .*qwen3_moe")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected at least 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor is '2', expected a number"),
        ({"num_experts_per_tok": 9}, "layer 1: .*top_k is 9, expected 1 to 8"),
        ({"n_group": 3}, "n_group is 3, expected a divisor of 16"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq', expected fp8"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt is 'e5m2', expected e4m3"),
        ({"quantization_config": {**FP8, "weight_block_size": [0, 1]}}, r"weight_block_size is"),
        ({"quantization_config": {**FP8, "weight_block_size": None}}, "weight_block_size is None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_is_not_served_is_refused_with_key_and_value(
    deepseek: Path, changes: dict[str, Any], says: str
) -> None:
    edit_config(deepseek, **changes)

    assert_refused(deepseek, rf"config\.json: .*{says}")


def test_a_qwen_with_a_wrong_list_of_dense_layers_is_refused(tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path)
    edit_config(tmp_path, mlp_only_layers=["1"])

    assert_refused(tmp_path, "mlp_only_layers is .*expected a list of integers")


def test_a_deepseek_v2_with_an_unknown_topk_method_is_refused(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v2", tmp_path)
    edit_config(tmp_path, topk_method="noaux_tc")

    assert_refused(tmp_path, "topk_method is 'noaux_tc', expected greedy or group_limited_greedy")


@pytest.mark.parametrize(
    "name",
    [
        UP,
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_refused_by_name(deepseek: Path, name: str) -> None:
    edit_tensors(deepseek, **{name: None})

    assert_refused(deepseek, rf"model\.safetensors: {name} is missing")


def test_a_missing_shared_gate_is_refused(tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path)
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    edit_tensors(tmp_path, **{name: None})

    assert_refused(tmp_path, f"{name} is missing")


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(deepseek: Path) -> None:
    edit_tensors(deepseek, **{UP: torch.zeros(32, 63)})

    assert_refused(deepseek, rf"{UP} has shape \[32, 63\], expected \[32, 64\]")


def test_a_tensor_that_is_no_weight_is_refused(deepseek: Path) -> None:
    edit_tensors(deepseek, **{UP: torch.zeros(32, 64, dtype=torch.int32)})

    assert_refused(deepseek, f"{UP} is torch.int32: not a dtype of weights")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_weight_that_is_not_finite_is_refused_when_read(deepseek: Path, bad: float) -> None:
    weight = torch.zeros(32, 64)
    weight[31, 63] = bad
    edit_tensors(deepseek, **{UP: weight})

    with Checkpoint.open(deepseek) as checkpoint:
        checkpoint.read_expert(Slot(1, 1))
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {UP} holds NaN"):
            checkpoint.read_expert(Slot(1, 2))


def test_a_weight_too_large_for_the_dtype_asked_for_is_refused(deepseek: Path) -> None:
    edit_tensors(deepseek, **{UP: torch.full((32, 64), 1e5)})

    with Checkpoint.open(deepseek) as checkpoint:
        checkpoint.read_expert(Slot(1, 2), torch.bfloat16)
        with pytest.raises(CheckpointError, match=r"infinity \(as torch.float16\)"):
            checkpoint.read_expert(Slot(1, 2), torch.float16)


def test_a_bias_that_is_not_finite_is_refused_when_read(deepseek: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(deepseek, **{name: torch.full((16,), math.nan)})

    with (
        Checkpoint.open(deepseek) as checkpoint,
        pytest.raises(CheckpointError, match=f"{name} holds NaN"),
    ):
        checkpoint.read_gate(1)


@pytest.mark.parametrize("change", [None, torch.zeros(1, 1)], ids=["missing", "wrong shape"])
def test_fp8_scales_that_do_not_fit_are_refused(fp8: Path, change: torch.Tensor | None) -> None:
    edit_tensors(fp8, **{UP + "_scale_inv": change})

    assert_refused(fp8, f"{UP}_scale_inv (is missing|has shape)")


def test_fp8_weights_without_a_quantization_config_are_refused(fp8: Path) -> None:
    edit_config(fp8, quantization_config=None)

    assert_refused(fp8, "is float8, but config.json has no FP8 quantization_config")


def test_a_truncated_file_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])

    assert_refused(sharded, f"{shard.name}: .*truncated")


def test_a_file_of_the_index_that_is_missing_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.unlink()

    assert_refused(sharded, f"{shard.name}: cannot be opened")


def edit_index(path: Path, change: dict[str, object]) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].update(change)
    file.write_text(json.dumps(index))


def test_an_index_that_names_the_wrong_file_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    wrong = next(file for file in index["weight_map"].values() if file != index["weight_map"][UP])
    edit_index(sharded, {UP: wrong})

    assert_refused(sharded, f"{wrong}: {UP} is missing, but the index puts it here")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", 3, ""], ids=str)
def test_an_index_that_points_out_of_its_folder_is_refused(sharded: Path, name: object) -> None:
    edit_index(sharded, {UP: name})

    assert_refused(sharded, rf"index\.json: {UP}: .* is not a file name")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "\xff", ""], ids=["cut", "list", "latin", "empty"])
def test_bad_json_is_refused_by_file_name(sharded: Path, file: str, text: str) -> None:
    (sharded / file).write_text(text, encoding="latin-1")

    assert_refused(sharded, f"{file}: is not")


def test_an_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")

    assert_refused(sharded, "has no weight_map")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, r"config\.json: cannot be read")


def test_a_folder_without_weights_is_refused(deepseek: Path) -> None:
    (deepseek / "model.safetensors").unlink()

    assert_refused(deepseek, r"holds neither model\.safetensors nor")


@pytest.mark.parametrize("slot", [Slot(9, 0), Slot(1, 17), Slot(1, -1)], ids=str)
def test_a_slot_that_does_not_exist_is_refused(deepseek: Path, slot: Slot) -> None:
    with Checkpoint.open(deepseek) as checkpoint, pytest.raises(CheckpointError):
        checkpoint.read_expert(slot)


def test_a_dense_layer_has_no_gate_to_read(deepseek: Path) -> None:
    with (
        Checkpoint.open(deepseek) as checkpoint,
        pytest.raises(CheckpointError, match="layer 0 is dense"),
    ):
        checkpoint.read_gate(0)
