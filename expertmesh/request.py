"""From what callers give to a message: every check that needs no server."""

from __future__ import annotations

import operator

import torch

from expertmesh.codec import tensors
from expertmesh.codec.messages import ForwardRequest
from expertmesh.errors import InvalidRequestError
from expertmesh.rpc.deadline import Deadline

_CPU = torch.device("cpu")


def make_request(
    hidden: torch.Tensor,
    layer: int,
    expert_ids: torch.Tensor | None,
    expert_weights: torch.Tensor | None,
    shared: bool,
    non_finite: str,
) -> ForwardRequest:
    """The message for `AsyncMesh.forward`'s arguments. Raises InvalidRequestError."""
    _check_tensor(hidden, "hidden", "hidden_states")
    try:
        layer = operator.index(layer)
    except TypeError:
        raise InvalidRequestError(f"layer is {layer!r}, expected an int", field="layer") from None
    if non_finite not in ("refuse", "pass"):
        raise InvalidRequestError(f"non_finite is {non_finite!r}, expected 'refuse' or 'pass'")
    if hidden.dtype not in tensors.NUMBER_BY_DTYPE:
        raise InvalidRequestError(
            f"hidden is {hidden.dtype}, expected float32, float16 or bfloat16: convert it",
            field="hidden_states.data_type",
        )
    if hidden.dim() < 1:
        raise InvalidRequestError(
            "hidden has no dimensions, expected [..., hidden_size]", field="hidden_states.shape"
        )
    if not -(1 << 31) <= layer < 1 << 31:
        raise InvalidRequestError(f"layer is {layer}, expected an index", field="layer")
    return ForwardRequest(
        layer=layer,
        hidden_states=_rows(hidden),
        expert_ids=_routing(expert_ids, torch.int32, "expert_ids"),
        expert_weights=_routing(expert_weights, torch.float32, "expert_weights"),
        pass_non_finite=non_finite == "pass",
        include_shared=shared,
    )


def deadline_after(timeout: float | None) -> Deadline:
    """The instant `timeout` seconds from now; None for never."""
    if timeout is not None and (not isinstance(timeout, int | float) or timeout != timeout):
        raise InvalidRequestError(f"timeout is {timeout!r}, expected seconds", field="timeout")
    return Deadline.after(timeout)


def _check_tensor(tensor: object, name: str, field: str) -> None:
    """Refuses what is no tensor, or holds no elements that could be sent."""
    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequestError(
            f"{name} is a {type(tensor).__name__}, expected a torch.Tensor", field=field
        )
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else str(tensor.layout)
        raise InvalidRequestError(f"{name} is {kind}, expected a dense tensor", field=field)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., X] as [T, X] on the CPU, even when it is empty."""
    is_plain = tensor.device == _CPU and not (tensor.requires_grad or tensor.is_neg())
    if is_plain and tensor.dim() == 2 and not tensor.is_complex() and tensor.numel():
        return tensor  # five calls of torch less, for each of which caches are cold
    flat = tensor.detach().to("cpu").resolve_conj().resolve_neg()
    rows = flat.numel() // flat.shape[-1] if flat.shape[-1] else 0
    return flat.reshape(rows, flat.shape[-1])


def _routing(tensor: torch.Tensor | None, dtype: torch.dtype, name: str) -> torch.Tensor | None:
    if tensor is None:
        return None
    _check_tensor(tensor, name, name)
    if tensor.dim() < 1:
        raise InvalidRequestError(f"{name} has no dimensions, expected [..., k]", field=name)
    if tensor.is_floating_point() != dtype.is_floating_point or (
        tensor.dtype in (torch.bool, torch.uint64) or tensor.is_complex()
    ):
        raise InvalidRequestError(
            f"{name} is {tensor.dtype}, expected {str(dtype).removeprefix('torch.')}", field=name
        )
    rows = _rows(tensor)
    if tensor.dtype in (torch.int64, torch.uint32) and rows.numel():
        # Out of range either way, but not wrapped around into it.
        rows = rows.to(torch.int64).clamp(-(1 << 31), (1 << 31) - 1)
    return rows.to(dtype)
