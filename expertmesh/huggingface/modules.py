"""What stands in a model where its feed-forward weights were. None of it has parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from expertmesh.errors import ConfigError

if TYPE_CHECKING:
    from expertmesh.huggingface.attachment import Attachment

#: The name of `config._experts_implementation` in a model that gates by itself.
IMPLEMENTATION = "expertmesh"


class RemoteFeedForward(nn.Module):
    """A dense layer, or a MoE block with its gate."""

    def __init__(self, attachment: Attachment, layer: int) -> None:
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
class RemoteExperts(nn.Module):
    """The experts of a MoE block whose gate stays; its shared expert comes along.

    transformers' experts interface calls it: `config._experts_implementation` names the function,
    which finds the layer here.
    """

    def __init__(
        self, config: Any, attachment: Attachment, layer: int, has_shared_expert: bool
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


class Zero(nn.Module):
    """A shared expert, or its gate, whose part is in what RemoteExperts returns."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """A zero that broadcasts."""
        return hidden.new_zeros(())


class Absent(nn.Module):
    """Holds a place between `from_pretrained` and attaching, whatever it is built with."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()


def _experts_forward(experts: Any, *args: Any, **kwargs: Any) -> Any:
    # Not RemoteExperts where another model shares the configuration object of an attached one:
    # it keeps computing in process. `__wrapped__` is the forward below transformers' dispatch.
    return type(experts).forward.__wrapped__(experts, *args, **kwargs)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


class _Detached(torch.autograd.Function):
    """A result without gradients, which `backward` refuses instead of treating as constant."""

    @staticmethod
    def forward(ctx: Any, attachment: Attachment, layer: int, *args: Any) -> torch.Tensor:
        return attachment.forward(args[0], layer, *args[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ConfigError(
            "no gradients pass through an attached model: its feed-forward layers run in the "
            "cluster, for inference only. Train the model before attaching it"
        )


# The graph breaks here: nothing in it can be compiled.
_call: Callable[..., torch.Tensor] = torch.compiler.disable(_Detached.apply)
