"""An attached model is never saved without its experts, whichever way it is tried."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import expertmesh
from expertmesh import ConfigError
from expertmesh.huggingface import attach, load_without_experts
from tests.attached import Served, both_gates, generate, logits, relative_error, serve


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Has a dense layer, and shared experts with a gate of their own."""
    with serve("qwen2_moe", tmp_path_factory.mktemp("qwen")) as found:
        yield found


def trainer_of(model: PreTrainedModel, path: Path) -> Trainer:
    arguments = TrainingArguments(output_dir=str(path), use_cpu=True, report_to=[])
    return Trainer(model=model, args=arguments)


Saving = Callable[[Any, Path], object]
WAYS: dict[str, Saving] = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "save_pretrained in shards": lambda model, path: model.save_pretrained(
        path, max_shard_size="50KB"
    ),
    "save_pretrained as it is": lambda model, path: model.save_pretrained(
        path, save_original_format=False
    ),
    "save_pretrained of given weights": lambda model, path: model.save_pretrained(
        path, state_dict=dict(model.named_parameters())
    ),
    "save_pretrained of the body": lambda model, path: model.model.save_pretrained(path),
    "save_pretrained of a copy": lambda model, path: copy.deepcopy(model).save_pretrained(path),
    "push_to_hub": lambda model, path: model.push_to_hub("nobody/nothing"),
    "state_dict": lambda model, path: torch.save(model.state_dict(), path / "model.pt"),
    "state_dict of a layer": lambda model, path: model.model.layers[1].state_dict(),
    "state_dict of a block": lambda model, path: model.model.layers[0].mlp.state_dict(),
    "the whole model": lambda model, path: torch.save(model, path / "model.pt"),
    "pickle": lambda model, path: pickle.dumps(model),
    "safetensors": lambda model, path: safetensors.torch.save_model(model, str(path / "m")),
    "Trainer": lambda model, path: trainer_of(model, path).save_model(),
    "accelerate": lambda model, path: Accelerator(cpu=True).save_model(model, str(path)),
    "distributed checkpoint": lambda model, path: get_model_state_dict(model),
}


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


@pytest.fixture(scope="module", params=["cluster", "model"])
def loaded(
    qwen: Served, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Path]]:
    """An attached model, and the folder of many files that it was loaded from."""
    path = tmp_path_factory.mktemp(request.param)
    qwen.reference.save_pretrained(path, max_shard_size="50KB")
    model = load_without_experts(path, qwen.address, gate=request.param)
    with model.expertmesh:
        yield model, path


@pytest.mark.parametrize("way", WAYS)
def test_an_attached_model_is_not_saved(
    qwen: Served, loaded: tuple[PreTrainedModel, Path], way: str
) -> None:
    model, path = loaded
    before = contents(path)
    assert len(before) > 5

    with pytest.raises(ConfigError, match=r"attached model cannot be (saved|pickled).*[Ll]oad"):
        WAYS[way](model, path)

    (path / "model.pt").unlink(missing_ok=True)  # torch opens it before it asks what goes in
    assert contents(path) == before
    assert relative_error(logits(model), qwen.logits) <= 1e-5


@both_gates
def test_a_model_is_not_saved_after_its_attachment_is_closed(
    qwen: Served, gate: Any, tmp_path: Path
) -> None:
    model = qwen.model()
    attach(model, qwen.address, gate=gate).close()

    with pytest.raises(ConfigError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be saved"):
        model.state_dict()
    assert list(tmp_path.iterdir()) == []


def test_a_model_saved_before_attaching_loads_as_it_was(qwen: Served, tmp_path: Path) -> None:
    model = qwen.model()
    model.save_pretrained(tmp_path)

    with attach(model, qwen.address):
        again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert relative_error(logits(again), qwen.logits) <= 1e-6


@both_gates
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_cluster_are_not_loaded_in_silence(
    qwen: Served, gate: Any, strict: bool
) -> None:
    model = qwen.model()
    weights = model.state_dict()

    with attach(model, qwen.address, gate=gate):
        with pytest.raises(ConfigError, match=r"mlp\..* cannot be loaded into an attached model"):
            model.load_state_dict(weights, strict=strict)

        kept = {name: weights[name] for name, _ in model.named_parameters()}
        model.load_state_dict(kept, strict=False)
        assert torch.equal(generate(model), qwen.text)


@both_gates
def test_an_adapter_for_the_cluster_s_layers_is_not_loaded_in_silence(
    qwen: Served, gate: Any
) -> None:
    model = qwen.model()
    adapter = {"model.layers.1.mlp.up_proj.lora_A.default.weight": torch.ones(4, 64)}

    with (
        attach(model, qwen.address, gate=gate),
        pytest.raises(ConfigError, match=r"1\.mlp\.up_proj\.lora_A.* cannot be loaded"),
    ):
        model.load_state_dict(adapter, strict=False)


@both_gates
def test_the_parts_that_stayed_can_be_saved(qwen: Served, gate: Any) -> None:
    model = qwen.model()

    with attach(model, qwen.address, gate=gate):
        found = model.model.layers[0].self_attn.state_dict()

    expected = qwen.reference.model.layers[0].self_attn.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_connection_is_neither_pickled_nor_copied(
    qwen: Served, copying: Callable[[object], object]
) -> None:
    with (
        expertmesh.connect(qwen.address) as mesh,
        pytest.raises(ConfigError, match=r"Mesh can neither be pickled nor copied.*connect"),
    ):
        copying(mesh)


async def _copied(address: str, copying: Callable[[object], object]) -> None:
    async with expertmesh.connect_async(address) as mesh:
        copying(mesh)


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_asyncio_connection_is_neither_pickled_nor_copied(
    qwen: Served, copying: Callable[[object], object]
) -> None:
    with pytest.raises(ConfigError, match="AsyncMesh can neither be pickled nor copied"):
        asyncio.run(_copied(qwen.address, copying))
