"""Checkpoints of every family: what is read equals the model that transformers saved."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

from expertmesh.checkpoint import Checkpoint, slot_digest
from expertmesh.gating import route, shared_weights
from expertmesh.model import ExpertWeights, LayerSpec, Slot
from tests.checkpoints import (
    FAMILIES,
    edit_config,
    edit_tensors,
    make_checkpoint,
    make_fp8_checkpoint,
)

Saved = tuple[Any, Path]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    path = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(request.param, path), path


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Path]:
    path = tmp_path_factory.mktemp("fp8")
    return make_fp8_checkpoint(path), path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    make_checkpoint("mixtral", path)
    return path


def run_expert(weights: ExpertWeights, hidden: torch.Tensor) -> torch.Tensor:
    gated = silu(linear(hidden, weights.gate)) * linear(hidden, weights.up)
    return linear(gated, weights.down)


def run_layer(checkpoint: Checkpoint, layer: LayerSpec, hidden: torch.Tensor) -> torch.Tensor:
    """One layer's output, token by token and expert by expert."""
    output = torch.zeros_like(hidden)
    if layer.has_shared:
        output += run_expert(checkpoint.read_expert(Slot(layer.index, layer.shared_id)), hidden)
    if layer.gate is None:
        return output
    gate = checkpoint.read_gate(layer.index)
    factor = shared_weights(hidden, gate)
    if factor is not None:
        output *= factor[:, None]
    experts = [checkpoint.read_expert(Slot(layer.index, e)) for e in range(layer.num_experts)]
    ids, weights = route(hidden, gate, layer.gate, gate.bias)
    for token, (row, factors) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, weight in zip(row, factors, strict=True):
            output[token] += weight * run_expert(experts[expert], hidden[token])
    return output


@torch.no_grad()
def test_every_layer_computed_from_the_checkpoint_equals_the_model(saved: Saved) -> None:
    model, path = saved
    hidden = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(8))

    with Checkpoint.open(path) as checkpoint:
        found = [run_layer(checkpoint, layer, hidden[0]) for layer in checkpoint.spec.layers]

    expected = [layer.mlp(hidden)[0] for layer in model.model.layers]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert min(float(output.std()) for output in expected) > 0.01


def test_reading_every_slot_reads_every_byte_of_the_slots_once(saved: Saved) -> None:
    _, path = saved

    with Checkpoint.open(path) as checkpoint:
        slots = [slot for layer in checkpoint.spec.layers for slot in layer.slots()]
        for slot in slots[::2]:
            checkpoint.read_expert(slot)

        assert checkpoint.bytes_read == sum(checkpoint.slot_bytes(slot) for slot in slots[::2])


def test_slot_bytes_are_those_of_three_matrices(mixtral: Path) -> None:
    with Checkpoint.open(mixtral) as checkpoint:
        assert checkpoint.slot_bytes(Slot(0, 3)) == 3 * 64 * 96 * 4


def test_a_checkpoint_in_many_files_is_the_same_checkpoint(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path / "one")
    make_checkpoint("deepseek_v3", tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3

    with Checkpoint.open(tmp_path / "one") as one, Checkpoint.open(tmp_path / "many") as many:
        assert many.spec == one.spec
        for slot in (slot for layer in one.spec.layers for slot in layer.slots()):
            assert slot_digest(one.read_expert(slot)) == slot_digest(many.read_expert(slot))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_come_in_the_dtype_asked_for(mixtral: Path, dtype: torch.dtype) -> None:
    with Checkpoint.open(mixtral) as checkpoint:
        own = checkpoint.read_expert(Slot(0, 1))
        asked = checkpoint.read_expert(Slot(0, 1), dtype)
        gate = checkpoint.read_gate(0, dtype)

    assert all(torch.equal(b, a.to(dtype)) for a, b in zip(own, asked, strict=True))
    assert gate.weight.dtype == dtype
    assert gate.bias.tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_run_dtype_is_the_configs(dtype: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, dtype=dtype)

    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.spec.dtype == dtype
        assert checkpoint.read_expert(Slot(0, 0)).gate.dtype == dtype


@pytest.mark.parametrize("named", [None, "auto"])
def test_without_a_usable_config_dtype_the_stored_one_counts(tmp_path: Path, named: object) -> None:
    make_checkpoint("mixtral", tmp_path, dtype=torch.float16)
    edit_config(tmp_path, dtype=named)

    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.spec.dtype == torch.float16


def test_the_older_spelling_of_the_config_dtype_is_read(mixtral: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(mixtral, tmp_path / "copy"))
    edit_config(path, dtype=None, torch_dtype="bfloat16")

    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.spec.dtype == torch.bfloat16


def test_a_gate_with_float32_logits_stays_float32_and_keeps_the_models_rounding(
    tmp_path: Path,
) -> None:
    model = make_checkpoint("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    router: Any = model.model.layers[1].mlp.gate

    with Checkpoint.open(tmp_path) as checkpoint:
        gate = checkpoint.read_gate(1)

    assert gate.weight.dtype == gate.bias.dtype == torch.float32
    assert torch.equal(gate.weight, router.weight.detach().float())
    assert torch.equal(gate.bias, router.e_score_correction_bias)
    assert (gate.bias < 0).any()


def test_fp8_weights_are_dequantised_by_block_ragged_edges_included(
    fp8: tuple[dict[str, torch.Tensor], Path],
) -> None:
    reference, path = fp8
    prefix = "model.layers.1.mlp.experts.3."

    with Checkpoint.open(path) as checkpoint:
        found = checkpoint.read_expert(Slot(1, 3), torch.float32)
        own = checkpoint.read_expert(Slot(1, 3))
        dense = checkpoint.read_expert(Slot(0, 0), torch.float32)

    assert torch.equal(found.gate, reference[prefix + "gate_proj.weight"])
    assert torch.equal(found.up, reference[prefix + "up_proj.weight"])
    assert torch.equal(found.down, reference[prefix + "down_proj.weight"])
    assert torch.equal(dense.down, reference["model.layers.0.mlp.down_proj.weight"])
    assert own.gate.dtype == torch.bfloat16
    assert torch.equal(own.gate, found.gate.bfloat16())


def test_fp8_slot_bytes_count_the_scales(fp8: tuple[dict[str, torch.Tensor], Path]) -> None:
    with Checkpoint.open(fp8[1]) as checkpoint:
        checkpoint.read_expert(Slot(1, 0))

        assert checkpoint.slot_bytes(Slot(1, 0)) == 3 * 192 * 144 + 3 * 4 * 4
        assert checkpoint.bytes_read == checkpoint.slot_bytes(Slot(1, 0))


def test_layers_after_the_last_are_not_served(fp8: tuple[dict[str, torch.Tensor], Path]) -> None:
    with Checkpoint.open(fp8[1]) as checkpoint:
        assert [layer.index for layer in checkpoint.spec.layers] == [0, 1, 2]


def test_the_digest_depends_on_the_model_and_not_on_the_folder(
    mixtral: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(mixtral, tmp_path / "copy"))
    retrained, other = tmp_path / "retrained", tmp_path / "other"
    make_checkpoint("mixtral", retrained, seed=1)
    make_checkpoint("mixtral", other, num_experts_per_tok=3)

    digests = []
    for path in (mixtral, copy, retrained, other):
        with Checkpoint.open(path) as checkpoint:
            digests.append(checkpoint.digest)
            assert checkpoint.bytes_read == 0

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert len(digests[0]) == 64


def test_slot_digests_differ_by_weight_and_by_dtype(mixtral: Path) -> None:
    with Checkpoint.open(mixtral) as checkpoint:
        weights = [
            checkpoint.read_expert(Slot(0, 0)),
            checkpoint.read_expert(Slot(0, 1)),
            checkpoint.read_expert(Slot(0, 0), torch.bfloat16),
        ]
        again = checkpoint.read_expert(Slot(0, 0))

    assert len({slot_digest(one) for one in weights}) == 3
    assert slot_digest(again) == slot_digest(weights[0])


def test_slots_can_be_read_from_many_threads(mixtral: Path) -> None:
    with Checkpoint.open(mixtral) as checkpoint:
        slots = [slot for layer in checkpoint.spec.layers for slot in layer.slots()] * 4
        expected = [slot_digest(checkpoint.read_expert(slot)) for slot in slots]
        before = checkpoint.bytes_read

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda slot: slot_digest(checkpoint.read_expert(slot)), slots))

        assert found == expected
        assert checkpoint.bytes_read == 2 * before


def test_defaults_stand_in_for_keys_that_config_json_leaves_out(tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path, num_experts_per_tok=4)
    edit_config(tmp_path, num_experts_per_tok=None, norm_topk_prob=None, decoder_sparse_step=None)

    with Checkpoint.open(tmp_path) as checkpoint:
        gate = checkpoint.spec.layers[0].gate

    assert gate
    assert (gate.top_k, gate.renormalize) == (4, False)


def test_a_deepseek_without_shared_experts_has_none(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path)
    edit_config(tmp_path, n_shared_experts=0)

    with Checkpoint.open(tmp_path) as checkpoint:
        assert not checkpoint.spec.layers[1].has_shared


def test_every_third_layer_routes_where_that_is_the_sparse_step(tmp_path: Path) -> None:
    make_checkpoint("qwen2_moe", tmp_path, num_hidden_layers=6, decoder_sparse_step=3)

    with Checkpoint.open(tmp_path) as checkpoint:
        kinds = [layer.kind for layer in checkpoint.spec.layers]
    assert kinds == ["dense", "dense", "moe"] * 2


def test_a_greedy_deepseek_v2_has_no_groups_whatever_the_config_says(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v2", tmp_path, topk_method="greedy")
    edit_config(tmp_path, n_group=4, topk_group=0)

    with Checkpoint.open(tmp_path) as checkpoint:
        gates = [layer.gate for layer in checkpoint.spec.layers if layer.gate]
    assert {(gate.n_group, gate.topk_group) for gate in gates} == {(1, 1)}


def test_moe_layer_freq_leaves_the_layers_between_dense(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path, first_k_dense_replace=2)
    dense = {f"model.layers.2.mlp.{p}_proj.weight": torch.ones(2, 2) for p in ("gate", "up")}
    edit_tensors(tmp_path, **dense)
    edit_config(tmp_path, moe_layer_freq=2)

    with Checkpoint.open(tmp_path) as checkpoint:
        assert [layer.kind for layer in checkpoint.spec.layers] == ["dense", "dense", "moe"]
