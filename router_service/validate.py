"""What a router refuses at its edge, and what it tells the caller to do about it. Pure."""

from __future__ import annotations

import numpy as np
import torch

from expertmesh.codec.messages import ForwardRequest
from expertmesh.codec.tensors import payload
from expertmesh.errors import InvalidRequestError, NonFiniteError, UnknownLayerError
from expertmesh.model import LayerSpec, ModelSpec

ACCEPTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: An element is NaN or infinite exactly when all bits of its exponent are set. So, as integers, the
#: largest positive one is at least this, or the largest of all without a sign is, with its top bit.
_INFINITY = {
    torch.float32: (np.int32, np.uint32, 0x7F800000, 0xFF800000),
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
}


def check(request: ForwardRequest, spec: ModelSpec, layer: LayerSpec | None) -> LayerSpec:
    """The layer that the request names. Raises InvalidRequestError or one of its kinds."""
    if layer is None:
        known = ", ".join(str(entry.index) for entry in spec.layers)
        raise UnknownLayerError(
            f"layer {request.layer} is not a feed-forward layer of this {spec.model_type} model, "
            f"which has {known}: see Describe",
            field="layer",
        )
    _check_hidden(request.hidden_states, spec)
    if request.expert_ids is not None or request.expert_weights is not None:
        _check_routing(request, layer)
    if not request.pass_non_finite:
        _check_finite(request.hidden_states)
    return layer


def _check_hidden(hidden: torch.Tensor, spec: ModelSpec) -> None:
    if hidden.dtype not in ACCEPTED_DTYPES:
        raise InvalidRequestError(
            f"hidden_states are {_name(hidden.dtype)}, expected float32, float16 or bfloat16: "
            "convert them",
            field="hidden_states.data_type",
        )
    if hidden.dim() != 2:
        raise InvalidRequestError(
            f"hidden_states have shape {list(hidden.shape)}, expected [tokens, "
            f"{spec.hidden_size}]: flatten the leading dimensions",
            field="hidden_states.shape",
        )
    if hidden.shape[1] != spec.hidden_size:
        raise InvalidRequestError(
            f"hidden_states have width {hidden.shape[1]}, expected {spec.hidden_size}: is the "
            "client's model the one that is served?",
            field="hidden_states.shape",
        )


def _check_routing(request: ForwardRequest, layer: LayerSpec) -> None:
    ids, weights = request.expert_ids, request.expert_weights
    if ids is None or weights is None:
        missing = "expert_ids" if ids is None else "expert_weights"
        raise InvalidRequestError(
            f"{missing} is absent: a caller that gates sends expert_ids and expert_weights both",
            field=missing,
        )
    if layer.num_experts == 0:
        raise InvalidRequestError(
            f"layer {layer.index} is dense and has no experts to choose: leave expert_ids out",
            field="expert_ids",
        )
    rows = len(request.hidden_states)
    if ids.dtype != torch.int32:
        raise InvalidRequestError(
            f"expert_ids are {_name(ids.dtype)}, expected int32", field="expert_ids.data_type"
        )
    if weights.dtype != torch.float32:
        raise InvalidRequestError(
            f"expert_weights are {_name(weights.dtype)}, expected float32",
            field="expert_weights.data_type",
        )
    if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] < 1:
        raise InvalidRequestError(
            f"expert_ids have shape {list(ids.shape)}, expected [{rows}, k] with k >= 1",
            field="expert_ids.shape",
        )
    if weights.shape != ids.shape:
        raise InvalidRequestError(
            f"expert_weights have shape {list(weights.shape)}, expected {list(ids.shape)} as "
            "expert_ids",
            field="expert_weights.shape",
        )
    _check_ids(ids, layer)
    if not request.pass_non_finite and not bool(torch.isfinite(weights).all()):
        raise NonFiniteError(
            "expert_weights hold NaN or infinity: mend the caller's gate, or ask to pass them",
            field="expert_weights",
        )


def _check_ids(ids: torch.Tensor, layer: LayerSpec) -> None:
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= layer.num_experts:
        raise InvalidRequestError(
            f"expert_ids hold {low if low < -1 else high}, expected 0 to {layer.num_experts - 1}, "
            "or -1 for none",
            field="expert_ids",
        )
    ordered = ids.sort(dim=1).values
    doubled = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(doubled.any()):
        row = int(doubled.any(1).nonzero()[0])
        raise InvalidRequestError(
            f"expert_ids name expert {int(ordered[row, 1:][doubled[row]][0])} twice in row {row}: "
            "add its weights up and name it once",
            field="expert_ids",
        )


def _check_finite(hidden: torch.Tensor) -> None:
    if hidden.numel() == 0:
        return
    # Two maxima in numpy: nothing is copied, and it keeps the interpreter lock (codec.tensors).
    signed, unsigned, positive, negative = _INFINITY[hidden.dtype]
    bits, largest = np.frombuffer(payload(hidden), signed), np.maximum.reduce
    if largest(bits) < positive and largest(bits.view(unsigned)) < negative:
        return
    bad = ~torch.isfinite(hidden)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"hidden_states hold {hidden[row, column].item()} in row {row}, column {column}: mend "
            "the caller, or send them with non_finite_policy PASS",
            field="hidden_states",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
