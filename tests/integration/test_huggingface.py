"""Hugging Face models whose feed-forward layers run in a real cluster on loopback."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    modeling_utils,
)
from transformers.monkey_patching import get_patch_mapping

from expertmesh import (
    CheckpointError,
    ConfigError,
    MeshError,
    MismatchError,
    UnavailableError,
)
from expertmesh.huggingface import attach, load_without_experts
from tests.attached import (
    TOKENS,
    Served,
    both_gates,
    generate,
    logits,
    relative_error,
    serve,
)
from tests.checkpoints import (
    FAMILIES,
    build_model,
    edit_config,
)

FEED_FORWARD = (".mlp.", ".block_sparse_moe.")
GATES = (".gate.weight", ".gate.e_score_correction_bias")


def feed_forward_weights(model: PreTrainedModel) -> set[str]:
    """Names of what a model holds of its feed-forward layers."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name for name, _ in held if any(part in name for part in FEED_FORWARD)}


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Each family in turn."""
    with serve(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve("deepseek_v3", tmp_path_factory.mktemp("deepseek")) as found:
        yield found


@both_gates
def test_an_attached_model_writes_what_it_does_in_process(served: Served, gate: Any) -> None:
    model = served.model()
    passes: list[object] = []
    model.register_forward_hook(lambda *_: passes.append(1))

    with attach(model, served.address, gate=gate) as attachment:
        error = relative_error(logits(model), served.logits)
        text = generate(model)

    assert error <= 1e-5
    assert torch.equal(text, served.text)
    assert len(passes) > 1
    assert attachment.rpcs == len(passes) * model.config.num_hidden_layers


@both_gates
def test_attaching_frees_the_feed_forward_weights(served: Served, gate: Any) -> None:
    model = served.model()
    kept = {n for n in feed_forward_weights(model) if gate == "model" and n.endswith(GATES)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    alive = {name: weakref.ref(tensor) for name, tensor in tensors if ".mlp." in name}
    assert any("experts" in name for name in alive)
    del tensors

    with attach(model, served.address, gate=gate):
        gc.collect()

        assert {name for name, tensor in alive.items() if tensor() is not None} == kept
        assert feed_forward_weights(model) == kept
        assert not any(parameter.is_meta for parameter in model.parameters())


@both_gates
def test_loading_without_experts_reads_none_of_their_bytes(
    served: Served, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = _Reads()
    monkeypatch.setattr(modeling_utils, "safe_open", reads.open)
    stored = load_file(served.path / "model.safetensors")
    wanted = {
        name
        for name in stored
        if not any(part in name for part in FEED_FORWARD)
        or (gate == "model" and name.endswith((*GATES, ".shared_expert_gate.weight")))
    }

    model = load_without_experts(served.path, served.address, gate=gate)

    with model.expertmesh:
        assert relative_error(logits(model), served.logits) <= 1e-5
    assert reads.names == wanted
    assert reads.num_bytes == sum(stored[name].nbytes for name in wanted)


class _Reads:
    """Stands before safetensors and notes which tensors leave a file."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.num_bytes = 0
        self._safe_open = modeling_utils.safe_open

    def open(self, *args: Any, **kwargs: Any) -> Any:
        return _NotedFile(self._safe_open(*args, **kwargs), self)

    def note(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self.names.add(name)
        self.num_bytes += tensor.nbytes
        return tensor


class _NotedFile:
    def __init__(self, file: Any, reads: _Reads) -> None:
        self._file, self._reads = file, reads
        self.keys = file.keys
        self.metadata = file.metadata

    def __enter__(self) -> _NotedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> _NotedSlice:
        return _NotedSlice(name, self._file.get_slice(name), self._reads)


class _NotedSlice:
    def __init__(self, name: str, stored: Any, reads: _Reads) -> None:
        self._name, self._stored, self._reads = name, stored, reads
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._reads.note(self._name, self._stored[index])


def test_a_client_needs_no_file_that_holds_experts(deepseek: Served, tmp_path: Path) -> None:
    stored = load_file(deepseek.path / "model.safetensors")
    attention = {name: tensor for name, tensor in stored.items() if ".mlp." not in name}
    save_file(attention, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((deepseek.path / "config.json").read_bytes())

    model = load_without_experts(tmp_path, deepseek.address)

    with model.expertmesh:
        assert torch.equal(generate(model), deepseek.text)


def test_the_keys_left_out_are_not_reported(deepseek: Served) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        load_without_experts(deepseek.path, deepseek.address).expertmesh.close()
    finally:
        logger.removeHandler(handler)

    assert [r.getMessage() for r in records if r.levelno >= logging.WARNING] == []


def test_loading_that_fails_leaves_transformers_as_it_was(deepseek: Served) -> None:
    with pytest.raises(ValueError, match="no_such_attention"):
        load_without_experts(
            deepseek.path, deepseek.address, attn_implementation="no_such_attention"
        )

    assert get_patch_mapping() == {}
    model = DeepseekV3ForCausalLM.from_pretrained(deepseek.path)
    assert relative_error(logits(model), deepseek.logits) <= 1e-6


@pytest.mark.parametrize("gate", ["", "router", None])
def test_a_gate_that_is_neither_is_refused(deepseek: Served, gate: Any) -> None:
    with pytest.raises(ConfigError, match="expected 'cluster' or 'model'"):
        attach(deepseek.model(), deepseek.address, gate=gate)
    with pytest.raises(ConfigError, match="expected 'cluster' or 'model'"):
        load_without_experts(deepseek.path, deepseek.address, gate=gate)


def test_a_family_that_is_not_served_is_refused_by_name(deepseek: Served, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=r"'llama'.* served are deepseek_v2, .* qwen3_moe"):
        attach(LlamaForCausalLM(config), deepseek.address)
    with pytest.raises(ConfigError, match=r"'llama'.* served are deepseek_v2, .* qwen3_moe"):
        load_without_experts(tmp_path, deepseek.address)


def test_what_is_no_transformers_model_is_refused(deepseek: Served, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Linear, expected a transformers PreTrainedModel"):
        attach(torch.nn.Linear(1, 1), deepseek.address)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_without_experts(tmp_path, deepseek.address)


@both_gates
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {}, "model_type is 'qwen3_moe' in the model and 'deepseek_v3'"),
        ("deepseek_v3", {"hidden_size": 32}, "hidden_size is 32 in the model and 64"),
        ("deepseek_v3", {"num_hidden_layers": 2}, "num_hidden_layers is 2 in the model and 3"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "kind of layer 1 is 'dense'"),
        ("deepseek_v3", {"n_routed_experts": 8}, "num_experts of layer 1 is 8"),
        ("deepseek_v3", {"num_experts_per_tok": 2}, "top_k of layer 1 is 2 in the model and 4"),
    ],
)
def test_a_model_that_differs_from_the_cluster_is_refused_and_stays_whole(
    deepseek: Served, gate: Any, family: str, changes: dict[str, Any], message: str
) -> None:
    model = build_model(family, **changes)
    before = logits(model)

    with pytest.raises(MismatchError, match=message):
        attach(model, deepseek.address, gate=gate)

    assert torch.equal(logits(model), before)


def test_a_model_stays_whole_when_no_router_answers(deepseek: Served) -> None:
    model = deepseek.model()

    with pytest.raises(UnavailableError):
        attach(model, "127.0.0.1:1", timeout=0.2)

    assert relative_error(logits(model), deepseek.logits) <= 1e-6


def test_router_logits_need_the_model_to_gate(deepseek: Served) -> None:
    model = deepseek.model()
    model.config.output_router_logits = True

    with pytest.raises(ConfigError, match="use gate='model'"):
        attach(model, deepseek.address)
    with attach(model, deepseek.address, gate="model"):
        output = model(TOKENS, output_router_logits=True)

    assert len(output.router_logits) == 2  # of three layers, one is dense


def test_a_model_is_attached_once_at_a_time(deepseek: Served) -> None:
    model = deepseek.model()

    with attach(model, deepseek.address) as attachment:
        assert model.expertmesh is attachment
        with pytest.raises(ConfigError, match="attached already"):
            attach(model, deepseek.address)
        assert torch.equal(generate(model), deepseek.text)


@both_gates
def test_a_closed_attachment_says_what_to_do_and_can_be_renewed(
    deepseek: Served, gate: Any
) -> None:
    model = deepseek.model()
    attach(model, deepseek.address, gate=gate).close()
    model.expertmesh.close()  # once more does no harm

    with pytest.raises(ConfigError, match="attach it again, or load the model anew"):
        logits(model)
    with attach(model, deepseek.address, gate=gate):
        assert torch.equal(generate(model), deepseek.text)


def test_a_model_without_gates_cannot_gate(deepseek: Served) -> None:
    model = deepseek.model()
    attach(model, deepseek.address).close()

    with pytest.raises(ConfigError, match="no gate of its own"):
        attach(model, deepseek.address, gate="model")


def test_a_kimi_model_and_a_deepseek_cluster_fit(deepseek: Served, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(deepseek.path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((deepseek.path / "config.json").read_bytes())
    edit_config(tmp_path, model_type="kimi_k2")

    model = load_without_experts(tmp_path, deepseek.address)

    with model.expertmesh:
        assert torch.equal(generate(model), deepseek.text)


@both_gates
def test_no_gradient_passes_unnoticed(deepseek: Served, gate: Any) -> None:
    model = deepseek.model().train()

    with attach(model, deepseek.address, gate=gate):
        output = model(TOKENS, labels=TOKENS)
        with pytest.raises(MeshError, match="for inference only"):
            output.loss.backward()


@both_gates
def test_a_nan_stays_in_its_own_row(deepseek: Served, gate: Any) -> None:
    model = deepseek.model()
    embeds = model.get_input_embeddings()(TOKENS).detach()
    embeds[0, 0] = float("nan")
    expected = deepseek.reference(inputs_embeds=embeds).logits

    with attach(model, deepseek.address, gate=gate):
        actual = model(inputs_embeds=embeds).logits

    assert actual[0, 0].isnan().all()
    assert relative_error(actual[1], expected[1]) <= 1e-5


def test_a_compiled_layer_computes_the_same(deepseek: Served) -> None:
    model = deepseek.model()

    with attach(model, deepseek.address, gate="model") as attachment:
        model.model.layers[1].compile(backend="eager")
        error = relative_error(logits(model), deepseek.logits)

    assert error <= 1e-5
    assert attachment.rpcs == 3


def test_threads_share_a_model(deepseek: Served) -> None:
    model = deepseek.model()

    with attach(model, deepseek.address) as attachment, ThreadPoolExecutor(4) as threads:
        results = list(threads.map(logits, [model] * 16))

    assert all(relative_error(result, deepseek.logits) <= 1e-5 for result in results)
    assert attachment.rpcs == 16 * 3


def test_a_copy_of_an_attached_model_uses_the_same_connection(deepseek: Served) -> None:
    model = deepseek.model()

    with attach(model, deepseek.address) as attachment:
        twin = copy.deepcopy(model)

        assert torch.equal(generate(twin), deepseek.text)
        assert twin.expertmesh is attachment


@pytest.mark.parametrize("implementation", ["eager", "expertmesh"])
def test_a_model_that_shares_the_configuration_stays_in_process(
    deepseek: Served, implementation: str
) -> None:
    model = deepseek.model()
    bystander = DeepseekV3ForCausalLM(model.config).eval()
    bystander.load_state_dict(model.state_dict())

    with attach(model, deepseek.address, gate="model") as attachment:
        model.set_experts_implementation(implementation)
        text = generate(model)
        rpcs = attachment.rpcs

        assert torch.equal(generate(bystander), deepseek.text)
        assert attachment.rpcs == rpcs
    assert torch.equal(text, deepseek.text)
