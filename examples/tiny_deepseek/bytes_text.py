"""Text as bytes: the token id of a byte is its value, so this model needs no tokenizer files.

Byte 0 never occurs in Python source. It stands between files, and before the first byte of one.
"""

import torch

SEPARATOR = 0


def encode(text: str) -> torch.Tensor:
    """Return input ids `[1, T]`: the separator, then the UTF-8 bytes of `text`."""
    return torch.tensor([[SEPARATOR, *text.encode()]])


def decode(ids: torch.Tensor) -> str:
    """Return the text of ids `[T]` or `[1, T]`, without separators; broken UTF-8 becomes U+FFFD."""
    return bytes(i for i in ids.flatten().tolist() if i != SEPARATOR).decode(errors="replace")
