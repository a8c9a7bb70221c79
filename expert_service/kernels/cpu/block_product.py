"""What the compiled kernels are asked for: products of rows with blocks of a matrix."""

from __future__ import annotations

from typing import NamedTuple


class BlockProduct(NamedTuple):
    """Some rows times some blocks of one matrix or two.

    At `side`, a matrix of bytes has a float32 scale for each output and an int32 by which its sums
    are too big because rows are unsigned: [N / 64, 2, 64].
    """

    place: int  # of the first row; the others are at the places after it
    rows: int
    matrix: int  # addresses
    second: int
    first: int  # block
    stop: int
    groups: int  # of inputs, 32 bits each, in a row of a matrix
    side: int  # addresses
    second_side: int
