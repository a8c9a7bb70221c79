"""What stands in a model where its feed-forward weights were. None of it has parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from expertmesh.errors import ConfigError

#: The name of `config._experts_implementation` in a model that gates by itself.
IMPLEMENTATION = "expertmesh"
#: Held by whoever builds modules of transformers' classes, or has them patched: they belong to the
#: whole process.
BUILDING = threading.Lock()


def refuse_to_save(*args: object, **kwargs: object) -> NoReturn:
    """What every way of saving an attached model comes to."""
    raise ConfigError(
        "an attached model cannot be saved: its feed-forward weights are in the cluster, and what "
        "is saved without them loads with random ones. Copy the folder that the cluster serves, or "
        "load the model without attaching it and save that; save adapters before attaching"
    )


class RemoteLayers(Protocol):
    """What the modules ask for their results: an `Attachment`."""

    def forward(
        self,
        hidden: torch.Tensor,
        layer: int,
        expert_ids: torch.Tensor | None = None,
        expert_weights: torch.Tensor | None = None,
        shared: bool = False,
    ) -> torch.Tensor:
        """One feed-forward layer of the cluster. Raises MeshError."""
        ...


class StandIn(nn.Module):
    """Base of what attaching puts into a model. Neither saves nor loads weights in silence."""

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        refuse_to_save()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: object
    ) -> None:
        for name in state_dict:
            if name.startswith(prefix):
                raise ConfigError(
                    f"{name} cannot be loaded into an attached model: the cluster computes that "
                    "layer, from its own checkpoint. Load weights and adapters before attaching, "
                    "and serve a checkpoint that holds them"
                )


class RemoteFeedForward(StandIn):
    """A dense layer, or a MoE block with its gate."""

    def __init__(self, attachment: RemoteLayers, layer: int) -> None:
        super().__init__()
        self.attachment = attachment
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` is [..., H], and so is the result."""
        return _call(self.attachment, self.layer, hidden)

    def extra_repr(self) -> str:
        """As nn.Module prints it."""
        return f"layer={self.layer}"


@use_experts_implementation
class RemoteExperts(StandIn):
    """The experts of a MoE block whose gate stays; its shared expert comes along.

    transformers' experts interface calls it: `config._experts_implementation` names the function,
    which finds the layer here.
    """

    def __init__(
        self, config: Any, attachment: RemoteLayers, layer: int, has_shared_expert: bool
    ) -> None:
        super().__init__()
        self.attachment = attachment
        self.layer = layer
        self.has_shared_expert = has_shared_expert

    def forward(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden` is [T, H], ids and weights [T, k]; the result is [T, H]."""
        return _call(
            self.attachment, self.layer, hidden, expert_ids, expert_weights, self.has_shared_expert
        )

    def extra_repr(self) -> str:
        """As nn.Module prints it."""
        return f"layer={self.layer}"


class Zero(StandIn):
    """A shared expert, or its gate, whose part is in what RemoteExperts returns."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A zero that broadcasts."""
        return hidden.new_zeros(())


class Absent(nn.Module):
    """Holds a place between `from_pretrained` and attaching, whatever it is built with."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()


#: What holds no weights of its own.
PLACEHOLDERS = (StandIn, Absent)


def _experts_forward(experts: Any, *args: Any, **kwargs: Any) -> Any:
    # Not RemoteExperts where another model shares the configuration object of an attached one:
    # it keeps computing in process. `__wrapped__` is the forward below transformers' dispatch.
    return type(experts).forward.__wrapped__(experts, *args, **kwargs)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


class _Detached(torch.autograd.Function):
    """A result without gradients, which `backward` refuses instead of treating as constant."""

    @staticmethod
    def forward(ctx: Any, attachment: RemoteLayers, layer: int, *args: Any) -> torch.Tensor:
        return attachment.forward(args[0], layer, *args[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ConfigError(
            "no gradients pass through an attached model: its feed-forward layers run in the "
            "cluster, for inference only. Train the model before attaching it"
        )


# The graph breaks here: nothing in it can be compiled.
_call: Callable[..., torch.Tensor] = torch.compiler.disable(_Detached.apply)
