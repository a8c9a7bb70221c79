"""Attaching: the model's feed-forward layers become calls to a cluster, and their weights go."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from expertmesh.client import Mesh, connect
from expertmesh.errors import ConfigError
from expertmesh.huggingface.dequantised import check_exact
from expertmesh.huggingface.matching import check_gate, check_model
from expertmesh.huggingface.modules import (
    IMPLEMENTATION,
    PLACEHOLDERS,
    RemoteExperts,
    RemoteFeedForward,
    StandIn,
    Zero,
    refuse_to_save,
)
from expertmesh.huggingface.untouched import check_untouched
from expertmesh.huggingface.weights import check_weights
from expertmesh.info import LayerInfo

# What a block adds to its experts' output; the cluster adds it in the same RPC.
_SHARED_PARTS = ("shared_experts", "shared_expert", "shared_expert_gate")
# What nn.Module keeps hooks in. A handle that removes a hook knows the dictionary, not the module.
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Attachment:
    """A model's connection to a cluster; also reachable as `model.expertmesh`.

    Closing it, or leaving its `with`, ends the connection. The model does not work from then on:
    the weights of its feed-forward layers are gone from this process. Attach it again, with the
    same gate, or load it anew.
    """

    def __init__(self, mesh: Mesh, gate: Literal["cluster", "model"], timeout: float) -> None:
        self.mesh = mesh
        self.gate = gate
        self.timeout = timeout  # seconds, for each feed-forward layer of each forward pass
        self._lock = threading.Lock()
        self._rpcs = 0
        self._closed = False

    @property
    def rpcs(self) -> int:
        """Forward requests made so far: one for each feed-forward layer of each forward pass."""
        return self._rpcs

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed

    def forward(
        self,
        hidden: torch.Tensor,
        layer: int,
        expert_ids: torch.Tensor | None = None,
        expert_weights: torch.Tensor | None = None,
        shared: bool = False,
    ) -> torch.Tensor:
        """One feed-forward layer, in one RPC. Raises MeshError."""
        if self._closed:
            raise ConfigError(
                "the model's attachment is closed and its feed-forward weights are gone: attach it "
                "again, or load the model anew"
            )
        with self._lock:
            self._rpcs += 1
        return self.mesh.forward(
            hidden,
            layer,
            expert_ids=expert_ids,
            expert_weights=expert_weights,
            shared=shared,
            non_finite="pass",  # as in process: a NaN in a padding row harms nobody
            timeout=self.timeout,
        )

    def close(self) -> None:
        """Ends the connection. May be called again."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self.mesh.close()

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copy of the model uses the same connection

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "an attached model cannot be pickled (torch.save, worker processes, Ray): it holds a "
            "connection, and no feed-forward weights. Load and attach it in the process that uses "
            "it"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def attach(
    model: PreTrainedModel,
    address: str,
    gate: Literal["cluster", "model"] = "cluster",
    timeout: float = 30.0,
    wire_dtype: torch.dtype | str | None = None,
) -> Attachment:
    """Runs every feed-forward layer of a loaded model in the cluster at `address`.

    `gate="cluster"`: routers gate, and the model keeps nothing of its MoE blocks. `gate="model"`:
    the model's own gates choose and weigh the experts, the cluster computes them. Dense layers and
    shared experts run in the cluster either way. The model's own copies are freed. It generates as
    before, and neither trains nor can be saved: `backward` and `state_dict` raise. It has to be the
    model that the cluster serves: every setting of its feed-forward layers is compared, they have
    to be as transformers builds them, without adapters or hooks inside, and a few weights are
    compared where the model was loaded from the folder that is served. Hooks on a block itself
    stay. `wire_dtype` lets hidden states travel narrower, see `expertmesh.connect`.
    docs/huggingface.md has more.

    Raises ConfigError or MismatchError, leaving the model as it was, when it is of a family that
    is not served, differs from what the cluster serves or is attached already, and
    UnavailableError when no router answers within `timeout` seconds.
    """
    check_gate(gate)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected a transformers PreTrainedModel: attach "
            "the model inside it, which the wrapper then calls"
        )
    _check_not_attached(model)
    attachment = open_attachment(model.config, address, gate, timeout, wire_dtype)
    try:
        _check_untouched(model, attachment)
        check_exact(model)
        install(model, attachment)
    except BaseException:
        attachment.close()
        raise
    return attachment


def open_attachment(
    config: Any,
    address: str,
    gate: Literal["cluster", "model"],
    timeout: float,
    wire_dtype: torch.dtype | str | None = None,
) -> Attachment:
    """Connects to a cluster that serves the model of this transformers configuration."""
    mesh = connect(address, timeout=timeout, wire_dtype=wire_dtype)
    try:
        check_model(config, mesh.describe(), gate)
    except BaseException:
        mesh.close()
        raise
    return Attachment(mesh, gate, timeout)


def install(model: PreTrainedModel, attachment: Attachment) -> None:
    """Replaces the feed-forward layers of a model by calls through `attachment`."""
    layers = attachment.mesh.describe().layers
    decoder = _decoder_layers(model, layers)
    keeps_gates = attachment.gate == "model"
    if keeps_gates:
        _check_gates(model, decoder, layers)
    for layer, module in zip(layers, decoder, strict=True):
        if keeps_gates and layer.kind == "moe":
            _install_experts(module.mlp, layer, attachment, model.config)
        else:
            module.mlp = _with_hooks_of(module.mlp, RemoteFeedForward(attachment, layer.index))
    if keeps_gates:
        model.set_experts_implementation(IMPLEMENTATION)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            _refuse_what_cannot_be(part, attachment.gate)
    model.expertmesh = attachment


def _check_untouched(model: PreTrainedModel, attachment: Attachment) -> None:
    """Refuses what `install` would drop although the cluster does not have it."""
    layers = attachment.mesh.describe().layers
    decoder = _decoder_layers(model, layers)
    keeps_gates = attachment.gate == "model"
    dropped = [
        _dropped(module.mlp, keeps_gates and layer.kind == "moe")
        for layer, module in zip(layers, decoder, strict=True)
    ]
    name = _name_of(model, decoder[0])
    check_untouched(model.config, decoder, name, dropped)
    check_weights(model.config, attachment.mesh.describe(), decoder, name, keeps_gates)


def _check_not_attached(model: PreTrainedModel) -> None:
    """Refuses a model any part of which has a connection: itself, its head or its body."""
    for name, module in model.named_modules():
        attachment = getattr(module, "attachment", None) if isinstance(module, StandIn) else None
        if attachment is not None and not attachment.closed:
            raise ConfigError(
                f"the model is attached already ({name}): close its attachment first, which is "
                "model.expertmesh"
            )


def _decoder_layers(model: PreTrainedModel, layers: tuple[LayerInfo, ...]) -> list[Any]:
    """The decoder layers, in the order of the cluster's."""
    decoder = list(getattr(model.base_model, "layers", ()))
    if len(decoder) != len(layers) or not all(hasattr(module, "mlp") for module in decoder):
        raise ConfigError(
            f"{type(model).__name__} has {len(decoder)} decoder layers with an `mlp`, its "
            f"configuration says {len(layers)}: load it with the class that transformers has for "
            f"model_type {model.config.model_type!r}"
        )
    for layer, module in zip(layers, decoder, strict=True):
        routes = hasattr(module.mlp, "experts")
        if routes != (layer.kind == "moe") and not isinstance(module.mlp, PLACEHOLDERS):
            raise ConfigError(
                f"layer {layer.index} is a {type(module.mlp).__name__} in the model and "
                f"{layer.kind!r} in the cluster: attach the model that the cluster serves"
            )
    return decoder


def _name_of(model: PreTrainedModel, first: nn.Module) -> str:
    """What the list of decoder layers is called, as in the names of weights."""
    name: str = next(name for name, module in model.named_modules() if module is first)
    return name.removesuffix(".0")


def _dropped(block: nn.Module, keeps_gate: bool) -> list[str]:
    """The parts of a decoder layer that attaching replaces."""
    if not keeps_gate:
        return ["mlp"]
    parts = ("experts", *_SHARED_PARTS)
    return [f"mlp.{name}" for name in parts if isinstance(getattr(block, name, None), nn.Module)]


def _check_gates(model: PreTrainedModel, decoder: list[Any], layers: tuple[LayerInfo, ...]) -> None:
    for layer, module in zip(layers, decoder, strict=True):
        if layer.kind == "moe" and not hasattr(module.mlp, "gate"):
            raise ConfigError(
                f"layer {layer.index} has no gate of its own any more: use gate='cluster', or load "
                "the model anew"
            )
    if not model._can_set_experts_implementation():
        raise ConfigError(
            f"gate='model' needs transformers' experts interface, which {type(model).__name__} of "
            f"{type(model).__module__} lacks: use gate='cluster'"
        )


def _install_experts(
    block: nn.Module, layer: LayerInfo, attachment: Attachment, config: Any
) -> None:
    shared = [name for name in _SHARED_PARTS if isinstance(getattr(block, name, None), nn.Module)]
    for name in shared:
        setattr(block, name, Zero())
    block.experts = RemoteExperts(config, attachment, layer.index, layer.has_shared_expert)


def _with_hooks_of(block: nn.Module, stand_in: StandIn) -> StandIn:
    """The stand-in with the hooks of the block that it replaces, in the same tables."""
    for table in _HOOK_TABLES:
        setattr(stand_in, table, getattr(block, table))
    return stand_in


def _refuse_what_cannot_be(model: PreTrainedModel, gate: str) -> None:
    """Refuses saving before anything is written, and router logits of a router that is gone.

    Only what reaches `state_dict` is refused by the stand-ins themselves.
    """
    model.save_pretrained = model.push_to_hub = refuse_to_save
    hooks = model._forward_pre_hooks
    if gate == "cluster" and _refuse_router_logits not in hooks.values():
        model.register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)


def _refuse_router_logits(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    asked = kwargs.get("output_router_logits")
    if getattr(model.config, "output_router_logits", False) if asked is None else asked:
        raise ConfigError(
            "output_router_logits is True, but the model was attached with gate='cluster' and has "
            "no router: attach a fresh one with gate='model'"
        )
