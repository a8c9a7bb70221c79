"""What sits on the layers that the cluster computes is kept, or refused by name; never dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel

from expertmesh import ConfigError
from expertmesh.huggingface import attach
from tests.attached import Served, both_gates, generate, logits, relative_error, serve


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Layer 1 is dense; layers 0 and 2 have routed experts, and a shared one with a gate."""
    with serve("qwen2_moe", tmp_path_factory.mktemp("qwen")) as found:
        yield found


class LoraLinear(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Linear(base.in_features, 4, bias=False)
        self.lora_b = nn.Linear(4, base.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base_layer(hidden) + self.lora_b(self.lora_a(hidden))
        return output


class OtherLinear(nn.Linear):
    """As quantised layers are: a Linear by inheritance, computing something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Doubled(nn.Module):
    """A parametrisation that doubles."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * 2


class Around(nn.Module):
    """A wrapper of anything, which doubles."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.inner(*args) * 2


class Doubling(ModelHook):
    """A hook of accelerate's that does more than to place weights."""

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 2


def replace(name: str, wrap: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(parent: Any) -> None:
        setattr(parent, name, wrap(getattr(parent, name)))

    return change


def other_linear(base: nn.Linear) -> nn.Linear:
    other = OtherLinear(base.in_features, base.out_features, bias=False)
    other.weight = base.weight
    return other


def int8(module: Any) -> None:
    module.up_proj.weight = nn.Parameter(module.up_proj.weight.to(torch.int8), requires_grad=False)


def with_bias(module: Any) -> None:
    module.up_proj.bias = nn.Parameter(torch.ones(module.up_proj.out_features))


def patched_forward(module: Any) -> None:
    module.up_proj.forward = MethodType(
        lambda self, hidden: 2 * nn.Linear.forward(self, hidden), module.up_proj
    )


def forward_of_the_block(module: Any) -> None:
    before = module.forward
    module.forward = lambda hidden: 2 * before(hidden)


def narrower(module: Any) -> None:
    module.up_proj = nn.Linear(module.up_proj.in_features, 8, bias=False)
    module.gate_proj = nn.Linear(module.gate_proj.in_features, 8, bias=False)
    module.down_proj = nn.Linear(8, module.down_proj.out_features, bias=False)


#: What can be done to a network of three matrices, and what of it has to be named.
ON_A_NETWORK: dict[str, tuple[Callable[[Any], object], str]] = {
    "LoRA on gate_proj": (replace("gate_proj", LoraLinear), r"gate_proj is a .*LoraLinear"),
    "LoRA on up_proj": (replace("up_proj", LoraLinear), r"up_proj is a .*LoraLinear"),
    "LoRA on down_proj": (replace("down_proj", LoraLinear), r"down_proj is a .*LoraLinear"),
    "a subclass of Linear": (replace("up_proj", other_linear), r"up_proj is a .*OtherLinear"),
    "another activation": (replace("act_fn", lambda _: nn.GELU()), r"act_fn is a .*GELU"),
    "a parametrisation": (
        lambda m: parametrize.register_parametrization(m.up_proj, "weight", Doubled()),
        r"up_proj is a .*ParametrizedLinear",
    ),
    "weight_norm": (
        lambda m: nn.utils.parametrizations.weight_norm(m.up_proj),
        r"up_proj is a .*ParametrizedLinear",
    ),
    "pruning": (
        lambda m: prune.l1_unstructured(m.up_proj, "weight", amount=0.5),
        r"up_proj(\.weight_\w+ is there| has a hook)",
    ),
    "a forward hook": (
        lambda m: m.up_proj.register_forward_hook(lambda *args: args[2] * 2),
        r"up_proj has a hook \(.*lambda",
    ),
    "a forward pre-hook": (
        lambda m: m.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        r"down_proj has a hook",
    ),
    "a backward hook": (
        lambda m: m.up_proj.register_full_backward_hook(lambda *_: None),
        r"up_proj has a hook",
    ),
    "a patched forward": (patched_forward, r"up_proj has a forward of its own"),
    "another bias": (with_bias, r"up_proj\.bias is there"),
    "weights in int8": (int8, r"up_proj\.weight is quantised to torch\.int8"),
    "one module more": (lambda m: m.add_module("adapter", nn.Linear(1, 1)), r"adapter is there"),
    "other widths": (narrower, r"(gate|up|down)_proj\.(\w+_features is 8|weight has shape)"),
    "a hook of accelerate's": (
        lambda m: add_hook_to_module(m.up_proj, Doubling()),
        r"up_proj has a forward of its own",
    ),
}
NETWORKS = {
    "dense": "model.layers.1.mlp",
    "shared": "model.layers.2.mlp.shared_expert",
}


def assert_refused(model: PreTrainedModel, address: str, gate: Any, says: str) -> None:
    before = logits(model)

    with pytest.raises(ConfigError, match=says):
        attach(model, address, gate=gate)

    assert torch.equal(logits(model), before)  # it is as it was


@both_gates
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("what", ON_A_NETWORK)
def test_what_sits_on_a_network_is_refused_by_name(
    qwen: Served, gate: Any, network: str, what: str
) -> None:
    model = qwen.model()
    change, says = ON_A_NETWORK[what]
    change(model.get_submodule(NETWORKS[network]))

    with pytest.raises(ConfigError, match=rf"{NETWORKS[network]}\.{says}"):
        attach(model, qwen.address, gate=gate)

    assert not hasattr(model, "expertmesh")
    assert model.state_dict()  # nothing of it was replaced


#: The same for the routed experts, which are one module with two tensors.
ON_EXPERTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a wrapper": (replace("experts", Around), r"experts is a .*Around"),
    "a parametrisation": (
        lambda block: parametrize.register_parametrization(
            block.experts, "down_proj", Doubled(), unsafe=True
        ),
        r"experts is a .*Parametrized",
    ),
    "a hook": (
        lambda block: block.experts.register_forward_hook(lambda *args: args[2] * 2),
        r"experts has a hook",
    ),
    "another activation": (
        lambda block: setattr(block.experts, "act_fn", nn.GELU()),
        r"experts\.act_fn is a .*GELU",
    ),
    "a hook on the shared gate": (
        lambda block: block.shared_expert_gate.register_forward_hook(lambda *args: args[2] * 2),
        r"shared_expert_gate has a hook",
    ),
}


@both_gates
@pytest.mark.parametrize("what", ON_EXPERTS)
def test_what_sits_on_experts_is_refused_by_name(qwen: Served, gate: Any, what: str) -> None:
    model = qwen.model()
    change, says = ON_EXPERTS[what]
    change(model.model.layers[0].mlp)

    assert_refused(model, qwen.address, gate, rf"model\.layers\.0\.mlp\.{says}")


#: The gate goes with gate="cluster" and stays with gate="model".
ON_THE_GATE: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hook": (
        lambda gate: gate.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        "gate has a hook",
    ),
    "a patched forward": (
        lambda gate: setattr(gate, "forward", MethodType(_gate_twice, gate)),
        "gate has a forward of its own",
    ),
    "another setting": (
        lambda gate: setattr(gate, "norm_topk_prob", True),
        r"gate\.norm_topk_prob is True, the model's configuration says False",
    ),
    "fewer experts a token": (
        lambda gate: setattr(gate, "top_k", 2),
        r"gate\.top_k is 2, the model's configuration says 3",
    ),
}


def _gate_twice(gate: Any, hidden: torch.Tensor) -> Any:
    return type(gate).forward(gate, hidden * 2)


@pytest.mark.parametrize("what", ON_THE_GATE)
def test_what_sits_on_a_gate_is_refused_where_the_cluster_gates(qwen: Served, what: str) -> None:
    model = qwen.model()
    change, says = ON_THE_GATE[what]
    change(model.model.layers[2].mlp.gate)
    assert relative_error(logits(model), qwen.logits) > 1e-3

    assert_refused(model, qwen.address, "cluster", rf"model\.layers\.2\.mlp\.{says}")


@pytest.mark.parametrize("what", ON_THE_GATE)
def test_what_sits_on_a_gate_works_where_the_model_gates(qwen: Served, what: str) -> None:
    model = qwen.model()
    ON_THE_GATE[what][0](model.model.layers[2].mlp.gate)
    expected = logits(model)

    with attach(model, qwen.address, gate="model"):
        assert relative_error(logits(model), expected) <= 1e-5


@both_gates
@pytest.mark.parametrize("layer", [0, 1])
def test_another_block_is_refused_by_name(qwen: Served, gate: Any, layer: int) -> None:
    model = qwen.model()
    model.model.layers[layer].mlp = Around(model.model.layers[layer].mlp)

    with pytest.raises(ConfigError, match=rf"layer {layer} is a Around|{layer}\.mlp is a .*Around"):
        attach(model, qwen.address, gate=gate)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_put_on_a_block_is_refused(qwen: Served, layer: int) -> None:
    model = qwen.model()
    forward_of_the_block(model.model.layers[layer].mlp)

    assert_refused(
        model, qwen.address, "cluster", rf"layers\.{layer}\.mlp has a forward of its own"
    )


@both_gates
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "pre", "with kwargs", "always"])
def test_hooks_on_a_block_go_on_working(qwen: Served, gate: Any, layer: int, kind: str) -> None:
    model = qwen.model()
    block = model.model.layers[layer].mlp
    calls: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, *rest: Any) -> Any:
        calls.append(tuple(args[0].shape))
        return (args[0] * 1.5,) if kind == "pre" else rest[-1] * 1.5

    handle = {
        "forward": lambda: block.register_forward_hook(note),
        "pre": lambda: block.register_forward_pre_hook(note),
        "with kwargs": lambda: block.register_forward_hook(note, with_kwargs=True),
        "always": lambda: block.register_forward_hook(note, always_call=True),
    }[kind]()
    expected = logits(model)
    assert relative_error(expected, qwen.logits) > 1e-2

    with attach(model, qwen.address, gate=gate):
        assert relative_error(logits(model), expected) <= 1e-5
        assert calls == [(2, 7, 64)] * 2

        handle.remove()
        assert relative_error(logits(model), qwen.logits) <= 1e-5
    assert len(calls) == 2


@both_gates
def test_hooks_on_a_block_stay_when_it_is_attached_again(qwen: Served, gate: Any) -> None:
    model = qwen.model()
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))

    attach(model, qwen.address, gate=gate).close()
    with attach(model, qwen.address, gate=gate):
        logits(model)

    assert len(calls) == 3


@both_gates
def test_hooks_that_transformers_installs_by_itself_do_not_count(qwen: Served, gate: Any) -> None:
    model = qwen.model()
    model(torch.ones(1, 2, dtype=torch.int64), output_router_logits=True, output_hidden_states=True)

    with attach(model, qwen.address, gate=gate):
        assert torch.equal(generate(model), qwen.text)


@both_gates
def test_hooks_by_which_accelerate_places_weights_do_not_count(qwen: Served, gate: Any) -> None:
    model = qwen.model()
    for module in list(model.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, AlignDevicesHook("cpu"))

    with attach(model, qwen.address, gate=gate):
        assert torch.equal(generate(model), qwen.text)


@both_gates
def test_adapters_elsewhere_stay(qwen: Served, gate: Any) -> None:
    model = qwen.model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)
    expected = logits(model)
    assert relative_error(expected, qwen.logits) > 1e-3

    with attach(model, qwen.address, gate=gate):
        assert relative_error(logits(model), expected) <= 1e-5


@both_gates
def test_tied_layers_are_refused_by_name(qwen: Served, gate: Any) -> None:
    model = qwen.model()
    model.model.layers[2].mlp.shared_expert = model.model.layers[0].mlp.shared_expert

    assert_refused(model, qwen.address, gate, r"layers\.2\.mlp\.shared_expert\.\w+\.weight is tied")


def test_a_decoder_layer_that_cannot_be_built_anew_is_refused(qwen: Served) -> None:
    model = qwen.model()
    original = type(model.model.layers[1])

    class Wrapped(original):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            raise AssertionError("not called")

    model.model.layers[1].__class__ = Wrapped

    assert_refused(model, qwen.address, "cluster", "decoder layer 1 is a Wrapped")
