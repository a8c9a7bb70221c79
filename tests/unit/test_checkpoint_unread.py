"""A checkpoint is not refused for tensors that nobody reads, nor told apart by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expertmesh.checkpoint import Checkpoint, slot_digest
from expertmesh.errors import CheckpointError
from expertmesh.model import Slot
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint

ATTENTION = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind; tests change copies."""
    path = tmp_path_factory.mktemp("originals")
    make_checkpoint("deepseek_v3", path / "single", dtype=torch.bfloat16)
    make_checkpoint("deepseek_v3", path / "sharded", dtype=torch.bfloat16, max_shard_size="100KB")
    return path


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "single"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


def what_is_served(path: Path) -> tuple[str, list[str]]:
    """The digest of a checkpoint, and that of each of its slots as they are read."""
    with Checkpoint.open(path) as checkpoint:
        slots = [slot for layer in checkpoint.spec.layers for slot in layer.slots()]
        return checkpoint.digest, [slot_digest(checkpoint.read_expert(slot)) for slot in slots]


def edit_index(path: Path, **changes: str) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].update(changes)
    file.write_text(json.dumps(index))


def rewrite(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> None:
    """Puts one tensor, of any dtype, last into a single-file checkpoint, or in the place of one."""
    file = path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]
    header.pop("__metadata__", None)
    kept: dict[str, Any] = {}
    parts: list[bytes] = []
    start = 0
    for each, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if each != name:
            first, last = entry["data_offsets"]
            kept[each] = {**entry, "data_offsets": [start, start + last - first]}
            parts.append(body[first:last])
            start += last - first
    kept[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
    text = json.dumps(kept).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts) + data)


def test_an_index_entry_that_no_file_holds_is_no_obstacle(sharded: Path) -> None:
    expected = what_is_served(sharded)
    shard = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, **{"mtp.fc.weight": shard, "model.layers.3.mlp.gate.weight": shard})

    assert what_is_served(sharded) == expected


def test_a_file_that_holds_nothing_served_need_not_be_there(sharded: Path) -> None:
    expected = what_is_served(sharded)
    edit_index(sharded, **{"mtp.fc.weight": "mtp.safetensors"})

    assert what_is_served(sharded) == expected


def test_a_file_that_holds_nothing_served_may_be_damaged(sharded: Path) -> None:
    expected = what_is_served(sharded)
    edit_index(sharded, **{"mtp.fc.weight": "mtp.safetensors"})
    (sharded / "mtp.safetensors").write_bytes(b"\x00" * 20)

    assert what_is_served(sharded) == expected


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "NEW"])
def test_attention_in_a_dtype_that_is_not_known_is_no_obstacle(single: Path, dtype: str) -> None:
    slots = what_is_served(single)[1]
    rewrite(single, ATTENTION, dtype, [64, 64], bytes(2048))

    assert what_is_served(single)[1] == slots


def test_an_expert_in_a_dtype_that_is_not_known_is_refused_by_name(single: Path) -> None:
    rewrite(single, UP, "F4", [32, 64], bytes(1024))

    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {UP}: unknown dtype 'F4'"):
        Checkpoint.open(single)


@pytest.mark.parametrize("method", ["modelopt", "gptq", "compressed-tensors"])
def test_a_scheme_that_was_applied_to_attention_only_is_no_obstacle(
    single: Path, method: str
) -> None:
    expected = what_is_served(single)[1]
    rewrite(single, ATTENTION, "F4", [64, 64], bytes(2048))
    edit_config(single, quantization_config={"quant_method": method})

    assert what_is_served(single)[1] == expected


@pytest.mark.parametrize("suffix", ["input_scale", "weight_scale", "weight_scale_2"])
def test_a_scheme_that_scales_experts_is_refused(single: Path, suffix: str) -> None:
    rewrite(single, ATTENTION, "F4", [64, 64], bytes(2048))
    rewrite(single, UP.replace("weight", suffix), "F32", [1], bytes(4))
    edit_config(single, quantization_config={"quant_method": "modelopt"})

    with pytest.raises(CheckpointError, match="quant_method is 'modelopt', expected fp8"):
        Checkpoint.open(single)


def test_another_attention_is_the_same_to_the_cluster(single: Path) -> None:
    expected = what_is_served(single)
    file = load_file(single / "model.safetensors")
    edit_tensors(single, **{ATTENTION: file[ATTENTION] + 1})

    assert what_is_served(single) == expected


def test_another_expert_is_not(single: Path) -> None:
    digest = what_is_served(single)[0]
    file = load_file(single / "model.safetensors")
    edit_tensors(single, **{UP: file[UP] + 1})

    assert what_is_served(single)[0] != digest


def assert_refused(path: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(path)


def test_stacked_experts_are_refused_as_what_they_are(tmp_path: Path) -> None:
    model = make_checkpoint("deepseek_v3", tmp_path / "single")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)

    assert_refused(
        tmp_path / "stacked",
        r"1\.mlp\.experts\.0\.gate_proj\.weight is missing: the experts of this layer are stacked, "
        r"as in model\.layers\.1\.mlp\.experts\.\w+, .* for each expert, as save_pretrained",
    )
    with Checkpoint.open(tmp_path / "single") as checkpoint:  # which is what that wrote
        checkpoint.read_expert(Slot(1, 0))


def test_a_shared_expert_that_config_json_leaves_open_is_explained(single: Path) -> None:
    file = load_file(single / "model.safetensors")
    edit_tensors(single, **{name: None for name in file if "shared_experts" in name})
    edit_config(single, n_shared_experts=None)

    assert_refused(
        single,
        r"shared_experts\.gate_proj\.weight is missing: n_shared_experts is null in config\.json, "
        r"which stands for this family's 1\. Write 0 there if the model has no shared experts",
    )

    edit_config(single, n_shared_experts=0)
    with Checkpoint.open(single) as checkpoint:
        assert not checkpoint.spec.layers[1].has_shared


@pytest.mark.parametrize("stored", ["qweight", "weight_packed", "weight_blocks"])
def test_an_expert_in_another_format_is_refused_as_what_it_is(single: Path, stored: str) -> None:
    edit_tensors(single, **{UP: None, UP.replace("weight", stored): torch.zeros(4, 4)})

    assert_refused(single, rf"{UP} is missing: it is stored as {stored}, a quantised format")


def test_a_model_within_another_is_refused_as_what_it_is(single: Path) -> None:
    file = load_file(single / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): file[name] for name in file}
    edit_tensors(single, **{**dict.fromkeys(file), **renamed})

    assert_refused(single, r"is called model\.language_model\.layers\.0\.mlp\.gate_proj\.weight")


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("pattern", ["*.safetensors", "*.index.json", "config.json"])
def test_a_link_that_leads_nowhere_is_named_with_its_target(
    originals: Path, tmp_path: Path, kind: str, pattern: str
) -> None:
    path = Path(shutil.copytree(originals / kind, tmp_path / kind))
    found = sorted(path.glob(pattern))
    for file in found:
        file.unlink()
        file.symlink_to(f"../../blobs/of-{file.name}")

    if found:
        assert_refused(path, r"it is a symbolic link to \.\./\.\./blobs/of-.*, which is not there")
    else:
        Checkpoint.open(path).close()  # a single file has no index


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.fp16.safetensors", "model-Q4.gguf"])
def test_weights_in_another_kind_of_file_are_named(single: Path, file: str) -> None:
    (single / "model.safetensors").rename(single / file)

    assert_refused(single, rf"holds neither .*; it holds {file}, which is another format")
