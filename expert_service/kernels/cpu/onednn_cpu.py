"""What this CPU and this build of torch can do for the onednn backend, and what it takes instead.

Nothing is refused: the nearest format that works is taken, with a `FallbackWarning`.
"""

from __future__ import annotations

import warnings

import torch


class FallbackWarning(UserWarning):
    """Experts are computed in another way than was asked: slower, or in more memory."""


def has_packed_ops() -> bool:
    """Whether this build of torch has oneDNN's packed linear operators."""
    return torch.backends.mkldnn.is_available() and _has(
        torch.ops.mkldnn, "_reorder_linear_weight", "_linear_pointwise"
    )


def has_int8_ops() -> bool:
    """Whether this build of torch has oneDNN's packed int8 operators."""
    return torch.backends.mkldnn.is_available() and _has(
        torch.ops.onednn, "qlinear_prepack", "qlinear_pointwise"
    )


def has_int8_instructions() -> bool:
    """Whether this CPU adds up products of bytes in 32 bits.

    Without, sums of two products are cut at 16 bits: slow, and wrong for large values.
    """
    return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())


def has_tiles() -> bool:
    """Whether this CPU multiplies tiles (AMX), and not only vectors (AVX-512)."""
    return bool(torch.cpu._is_amx_tile_supported())


def compute_dtype(wanted: torch.dtype) -> torch.dtype:
    """`wanted`, or float32 where this CPU has no instructions for it. Warns then."""
    if not has_packed_ops():
        fall_back("this torch lacks oneDNN's packed linear operators: plain ones are used")
        return wanted
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if wanted in supported and not supported[wanted]():
        fall_back(f"this CPU cannot compute in {wanted}: float32 is used, in twice the memory")
        return torch.float32
    return wanted


def can_int8(instead: torch.dtype) -> bool:
    """Whether weights can stay int8. Warns that they are kept in `instead` where not."""
    lacks = ""
    if not has_int8_ops():
        lacks = "this torch lacks oneDNN's packed int8 operators"
    elif not has_int8_instructions():
        lacks = "this CPU has neither AVX-512 VNNI nor AMX"
    if lacks:
        fall_back(f"{lacks}: weights are kept in {instead}, not in int8")
    return not lacks


def _has(namespace: object, *names: str) -> bool:
    return all(hasattr(namespace, name) for name in names)


def fall_back(what: str) -> None:
    # Python's registry of warnings shows each text once from here.
    warnings.warn(f"onednn falls back: {what}", FallbackWarning, stacklevel=1)
