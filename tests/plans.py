"""Loads and servers that tests of the planner share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from load_controller.planner import Server

Floats = npt.NDArray[np.float64]

#: The example in the README of DeepSeek's EPLB: 16 slots, 4 groups, 2 nodes, 8 GPUs.
README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    np.float64,
)


def alike_servers(count: int, nodes: int = 1) -> list[Server]:
    """Servers of one speed and without a bound, divided among the nodes."""
    return [Server(name=f"s{i:03d}", node=f"n{i * nodes // count}") for i in range(count)]


def zipf(layers: int, experts: int, exponent: float, seed: int) -> Floats:
    """Load that falls off with an expert's rank, which is drawn for each layer."""
    rng = np.random.default_rng(seed)
    popularity = 1e6 / np.arange(1, experts + 1) ** exponent
    return np.stack([rng.permutation(popularity) for _ in range(layers)])
