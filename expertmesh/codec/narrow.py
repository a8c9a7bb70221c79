"""Hidden states made narrower for the wire, and wide again. Pure.

T rows, H hidden size. bfloat16 is a rounding of float32. FP8 is OCP E4M3: a row travels as its
elements divided by the row's scale, the least power of two by which none exceeds 448. Dividing and
multiplying by it are exact, in bfloat16 too, so the one error is the rounding to 3 bits of
mantissa: at most 2^-4 of an element, or 2^-10 of the scale for elements below 2^-6 of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.config import WireDtype
from expertmesh.errors import InvalidRequestError

FP8 = torch.float8_e4m3fn
#: What hidden states may travel as, by the names that settings take.
WIRE_DTYPES: dict[WireDtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float8_e4m3fn": FP8,
    "fp8": FP8,
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = 448.0  # of E4M3
_NAN = 0x7F  # of E4M3
_LEAST_SCALE, _MOST_SCALE = 2.0**-126, 2.0**119  # 448 * 2^119 is still finite in bfloat16
_INFINITY_BITS = 0x7F800000
_BLOCK_ROWS = 64  # whose intermediate values stay in a core's cache
#: bfloat16 bits of each element; and of each two neighbours, which numpy takes twice as fast.
_CODES = torch.arange(256, dtype=torch.uint8, device="cpu")
_ONE = _CODES.view(FP8).to(torch.bfloat16).view(torch.int16).numpy()
_BOTH = np.arange(1 << 16)
_TWO = np.stack((_ONE[_BOTH & 255], _ONE[_BOTH >> 8]), 1).view(np.int32).ravel()


def wire_dtype(wanted: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a setting names; None for the caller's own. Raises InvalidRequestError."""
    if wanted is None or wanted in WIRE_DTYPES.values():
        return wanted  # type: ignore[return-value]
    if wanted in WIRE_DTYPES:
        return WIRE_DTYPES[wanted]
    raise InvalidRequestError(
        f"wire_dtype is {wanted!r}, expected {', '.join(WIRE_DTYPES)} or None", field="wire_dtype"
    )


def narrowed(
    hidden_TH: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(hidden states as they travel, their scales [T] float32 where they are FP8).

    What is as narrow as `dtype` already stays as it is; so does everything for None.
    """
    if dtype is None or hidden_TH.dtype not in _FLOATS:
        return hidden_TH, None
    if hidden_TH.dtype.itemsize <= dtype.itemsize:
        return hidden_TH, None
    return _to_fp8(hidden_TH) if dtype == FP8 else (hidden_TH.to(dtype), None)


def widened(
    hidden_TH: torch.Tensor, scale_T: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Hidden states as they arrived, in `dtype`; their product with the scales is rounded once."""
    if scale_T is None:
        return hidden_TH.to(dtype)
    rows, width = hidden_TH.shape
    wide = torch.empty(hidden_TH.shape, dtype=dtype, device="cpu")
    if not wide.numel():
        return wide
    table = _ONE if width % 2 else _TWO
    codes = hidden_TH.contiguous().view(torch.uint8).numpy()
    codes = codes if width % 2 else codes.view(np.uint16)
    scale_T1 = scale_T[:, None]
    for start in range(0, rows, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        elements = torch.from_numpy(np.take(table, codes[block]).view(np.int16))
        wide[block] = elements.view(torch.bfloat16) * scale_T1[block]  # in float32
    return wide


def check(hidden: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Raises InvalidRequestError unless FP8 hidden states, and only they, have a scale a row."""
    if hidden.dtype != FP8:
        if scale is not None:
            raise InvalidRequestError(
                f"hidden_states_scale came with {_name(hidden.dtype)} hidden_states: only "
                "float8_e4m3 has scales, leave them out",
                field="hidden_states_scale",
            )
        return
    if scale is None:
        raise InvalidRequestError(
            "hidden_states are float8_e4m3 without hidden_states_scale: send a float32 scale for "
            "each row, or convert to float32, float16 or bfloat16",
            field="hidden_states_scale",
        )
    if scale.dtype != torch.float32:
        raise InvalidRequestError(
            f"hidden_states_scale are {_name(scale.dtype)}, expected float32",
            field="hidden_states_scale.data_type",
        )
    if hidden.dim() != 2:
        raise InvalidRequestError(
            f"hidden_states have shape {list(hidden.shape)}, expected [tokens, hidden_size]",
            field="hidden_states.shape",
        )
    if scale.shape != hidden.shape[:1]:
        raise InvalidRequestError(
            f"hidden_states_scale has shape {list(scale.shape)}, expected [{len(hidden)}]: one for "
            "each row",
            field="hidden_states_scale.shape",
        )
    _check_values(scale.numpy())


def _check_values(scale_T: npt.NDArray[np.float32]) -> None:
    right_T = (scale_T > 0) & (scale_T <= _MOST_SCALE)  # NaN is neither
    if not right_T.all():
        row = int(np.flatnonzero(~right_T)[0])
        raise InvalidRequestError(
            f"hidden_states_scale is {scale_T[row]} in row {row}, expected above 0 and at most "
            "2^119: divide a row by the largest of its magnitudes over 448",
            field="hidden_states_scale",
        )


def _to_fp8(hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_TH = hidden_TH.contiguous()
    rows = len(hidden_TH)
    elements = torch.empty(hidden_TH.shape, dtype=FP8, device="cpu")
    scale_T = torch.empty(rows, dtype=torch.float32, device="cpu")
    for start in range(0, rows, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        part = hidden_TH[block]
        part = part.float() if part.dtype == torch.float16 else part  # its range is too small
        bits_T = _largest_bits(part)
        scale_T[block] = torch.from_numpy(_scales(bits_T))
        elements[block] = part * (1.0 / scale_T[block])[:, None].to(part.dtype)
        if (bits_T >= _INFINITY_BITS).any():
            # Whether infinity saturates differs between versions of torch. It must stay visible.
            elements[block].view(torch.uint8)[~torch.isfinite(part)] = _NAN
    return elements, scale_T


def _largest_bits(part_TH: torch.Tensor) -> npt.NDArray[np.int32]:
    """The largest magnitude of each row as the bits of a float32: infinity or more for NaN."""
    wide = part_TH.dtype == torch.float32
    signed = part_TH.view(torch.int32 if wide else torch.int16).numpy()
    largest_T = (signed & (0x7FFFFFFF if wide else 0x7FFF)).max(1, initial=0)
    bits_T: npt.NDArray[np.int32] = largest_T.astype(np.int32) << (0 if wide else 16)
    return bits_T


def _scales(bits_T: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The least power of two by which each magnitude is at most 448; 1 for NaN and infinity."""
    finite_T = np.where(bits_T < _INFINITY_BITS, bits_T, np.float32(_LARGEST).view(np.int32))
    quotient_T = finite_T.view(np.float32) / np.float32(_LARGEST)
    # Up to the next exponent, unless the mantissa is zero.
    up_T = (quotient_T.view(np.int32) + 0x7FFFFF) & ~0x7FFFFF
    return np.clip(up_T.view(np.float32), np.float32(_LEAST_SCALE), np.float32(_MOST_SCALE))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
