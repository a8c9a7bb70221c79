"""Models as people use them: in parts, several at once, compiled, offloaded, in another dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3Model,
    PreTrainedModel,
)

from expertmesh import CheckpointError, ConfigError, MismatchError
from expertmesh.huggingface import attach, load_without_experts
from tests.attached import (
    MASK,
    TOKENS,
    Served,
    both_gates,
    generate,
    logits,
    relative_error,
    serve,
)
from tests.checkpoints import edit_config, edit_tensors, make_checkpoint
from tests.mesh import local_mesh


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve("deepseek_v3", tmp_path_factory.mktemp("deepseek")) as found:
        yield found


def copied(served: Served, path: Path) -> Path:
    """The files of its checkpoint, for a test to spoil."""
    for file in served.path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@both_gates
def test_a_body_without_its_head_is_attached(deepseek: Served, gate: Any) -> None:
    body = DeepseekV3Model.from_pretrained(deepseek.path)
    expected = body(TOKENS, attention_mask=MASK).last_hidden_state

    with attach(body, deepseek.address, gate=gate):
        found = body(TOKENS, attention_mask=MASK).last_hidden_state

    assert relative_error(found, expected) <= 1e-5


@both_gates
def test_the_body_of_a_model_is_attached_and_its_head_goes_on(deepseek: Served, gate: Any) -> None:
    model = deepseek.model()

    with attach(model.model, deepseek.address, gate=gate):
        assert torch.equal(generate(model), deepseek.text)
        with pytest.raises(ConfigError, match=r"attached already \(model\.layers\.0\.mlp\)"):
            attach(model, deepseek.address, gate=gate)
        with pytest.raises(ConfigError, match="cannot be saved"):
            model.state_dict()


@both_gates
def test_another_head_is_attached(deepseek: Served, gate: Any) -> None:
    model = DeepseekV3ForSequenceClassification(deepseek.model().config).eval()
    model.model.load_state_dict(deepseek.reference.model.state_dict())
    model.config.pad_token_id = 0
    expected = model(TOKENS).logits

    with attach(model, deepseek.address, gate=gate):
        assert relative_error(model(TOKENS).logits, expected) <= 1e-5


def test_several_models_share_a_cluster_and_close_apart(deepseek: Served) -> None:
    first, second = deepseek.model(), deepseek.model()

    with attach(first, deepseek.address), attach(second, deepseek.address, gate="model"):
        first.expertmesh.close()

        assert torch.equal(generate(second), deepseek.text)
        with pytest.raises(ConfigError, match="attach it again"):
            generate(first)


class Around(torch.nn.Module):
    """As PeftModel and the like stand around a model."""

    def __init__(self, base_model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def compiled(model: PreTrainedModel) -> Any:
    """With the backend that warns of nothing when it is first imported."""
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [Around, torch.nn.DataParallel, compiled])
def test_a_wrapper_is_refused_and_goes_on_around_the_model_inside(
    deepseek: Served, wrap: Any
) -> None:
    model = deepseek.model()
    wrapped = wrap(model)

    with pytest.raises(
        ConfigError, match=r"expected a transformers PreTrainedModel: attach the mo"
    ):
        attach(wrapped, deepseek.address)
    if wrap is not compiled:  # which compiles: see below
        with attach(model, deepseek.address):
            assert relative_error(logits(wrapped), deepseek.logits) <= 1e-5


@both_gates
def test_a_model_compiled_before_is_attached(deepseek: Served, gate: Any) -> None:
    model = deepseek.model()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert relative_error(logits(model), deepseek.logits) <= 1e-5

    with attach(model, deepseek.address, gate=gate) as attachment:
        assert relative_error(logits(model), deepseek.logits) <= 1e-5
        assert attachment.rpcs == 3  # not what was compiled of the blocks that are gone


@both_gates
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_may_change_its_dtype(deepseek: Served, gate: Any, when: str) -> None:
    model = deepseek.model()
    if when == "before":
        model.double().half()

    with attach(model, deepseek.address, gate=gate):
        if when == "after":
            model.half()
        found = logits(model)

    assert found.dtype == torch.float16
    assert relative_error(found.float(), deepseek.logits) <= 0.2  # some rows choose other experts


@both_gates
def test_a_bfloat16_checkpoint_is_loaded_in_float32(gate: Any, tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))

    with local_mesh(tmp_path, dtype="float32") as mesh:
        model = load_without_experts(tmp_path, mesh.address, gate=gate, dtype="float32")
        with model.expertmesh:
            found = logits(model)

    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= 1e-5


@both_gates
def test_checkpointing_of_gradients_changes_no_output(deepseek: Served, gate: Any) -> None:
    model = deepseek.model().train()
    model.activation_checkpointing_enable()

    with attach(model, deepseek.address, gate=gate):
        output = model(TOKENS, attention_mask=MASK, labels=TOKENS)
        assert relative_error(output.logits, deepseek.logits) <= 1e-5
        with pytest.raises(ConfigError, match="for inference only"):
            output.loss.backward()


@both_gates
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_model_whose_weights_accelerate_keeps_elsewhere_is_attached(
    deepseek: Served, gate: Any, where: str, tmp_path: Path
) -> None:
    model = deepseek.model()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta

    with attach(model, deepseek.address, gate=gate):
        assert relative_error(logits(model), deepseek.logits) <= 1e-5


@both_gates
def test_a_model_is_loaded_onto_a_device_map(deepseek: Served, gate: Any) -> None:
    model = load_without_experts(deepseek.path, deepseek.address, gate=gate, device_map="cpu")

    with model.expertmesh:
        assert torch.equal(generate(model), deepseek.text)


@pytest.mark.parametrize("part", ["head", "body", "configuration"])
def test_router_logits_asked_for_in_a_call_need_the_model_to_gate(
    deepseek: Served, part: str
) -> None:
    model = deepseek.model()
    called = model.model if part == "body" else model
    asked = {} if part == "configuration" else {"output_router_logits": True}

    with attach(model, deepseek.address):
        model.config.output_router_logits = part == "configuration"
        with pytest.raises(ConfigError, match=r"output_router_logits is True.*gate='model'"):
            called(TOKENS, **asked)

        model.config.output_router_logits = False
        assert torch.equal(generate(model), deepseek.text)


@both_gates
def test_settings_given_to_the_loading_count_as_the_model_s(deepseek: Served, gate: Any) -> None:
    with pytest.raises(MismatchError, match="renormalize of layer 1 is False in the model"):
        load_without_experts(deepseek.path, deepseek.address, gate=gate, norm_topk_prob=False)

    model = load_without_experts(
        deepseek.path, deepseek.address, gate=gate, attention_dropout=0.5, dtype=torch.float32
    )
    with model.expertmesh:
        assert model.config.attention_dropout == 0.5
        assert torch.equal(generate(model), deepseek.text)


@both_gates
def test_a_model_that_differs_in_a_setting_is_refused_by_a_real_router(
    deepseek: Served, gate: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(deepseek.path, routed_scaling_factor=1.8)

    with pytest.raises(MismatchError, match=r"gate\.scale of layer 1 is 1\.8 in the model"):
        attach(model, deepseek.address, gate=gate)


@both_gates
def test_weights_that_are_missing_are_not_drawn_at_random(
    deepseek: Served, gate: Any, tmp_path: Path
) -> None:
    path = copied(deepseek, tmp_path)
    edit_tensors(path, **{"model.layers.1.self_attn.o_proj.weight": None})

    with pytest.raises(CheckpointError, match=r"1\.self_attn\.o_proj\.weight is missing"):
        load_without_experts(path, deepseek.address, gate=gate)


def test_a_folder_with_an_adapter_is_refused(deepseek: Served, tmp_path: Path) -> None:
    path = copied(deepseek, tmp_path)
    (path / "adapter_config.json").write_text("{}")

    with pytest.raises(ConfigError, match="holds an adapter"):
        load_without_experts(path, deepseek.address)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path))

    with local_mesh(tmp_path) as mesh:
        model = load_without_experts(tmp_path, mesh.address)
        with model.expertmesh:
            found = logits(model)

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert relative_error(found, expected) <= 1e-5


def test_a_router_of_an_earlier_release_is_told_apart_from_a_model_that_differs(
    deepseek: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertmesh.v1 import router_pb2 as pb
    from router_service import servicer

    def earlier(layer: Any) -> pb.Layer:
        kind = pb.LAYER_KIND_MOE if layer.kind == "moe" else pb.LAYER_KIND_DENSE
        return pb.Layer(
            index=layer.index,
            kind=kind,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            has_shared_expert=layer.has_shared_expert,
        )

    monkeypatch.setattr(servicer, "layer_message", earlier)

    with pytest.raises(MismatchError, match="router at this address is of an earlier release"):
        attach(deepseek.model(), deepseek.address)


def test_an_edit_of_config_json_alone_is_noticed(deepseek: Served, tmp_path: Path) -> None:
    path = copied(deepseek, tmp_path)
    edit_config(path, topk_group=1)

    with pytest.raises(MismatchError, match=r"gate\.topk_group of layer 1 is 1 in the model and 2"):
        load_without_experts(path, deepseek.address)
