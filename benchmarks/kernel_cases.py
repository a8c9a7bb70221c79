"""The shards that kernels are measured on, what they should reach, and the floor under them. Pure.

T tokens, K experts asked per token, E experts held, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["bf16", "w8a16", "w8a8"]

_FP8_OVER_BF16 = 1.92  # products a second; assumed, not measured
TOKENS = (1, 16, 128, 1024, 8192)
_FP8_SHARE = 0.6  # of bf16's time, where memory sets it and the floor is above ...
_FP8_FROM_US = 100.0
_W8A8_FLOPS_PER_S = 600e12  # to reach at the most tokens, on the shard that says so


@dataclass(frozen=True, slots=True)
class Chip:
    """What a GPU reaches: in a large copy, and in a large bf16 matrix product."""

    bytes_per_s: float
    flops_per_s: float
    is_h200: bool = False  # what is asked for is asked of an H200


#: As others measured it; for the floors and requirements that the project was given.
H200 = Chip(4.3e12, 780e12, is_h200=True)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one GPU holds of one layer; all ids are local."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    required_us: tuple[float, ...] = ()  # to reach in bf16, for each of TOKENS
    fp8_rate: bool = False  # whether w8a8 must reach its rate at the most tokens

    @property
    def expert_elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate

    def flops(self, tokens: int) -> int:
        """Of all pairs."""
        return 2 * self.expert_elements * tokens * self.top_k


SHARDS = (
    Shard("DeepSeek-V3 8 experts", 7168, 2048, 8, 8, (185, 185, 205, 1250, 9500), fp8_rate=True),
    Shard("Qwen3-30B-A3B", 2048, 768, 128, 8, (35, 205, 310, 375, 1250)),
    Shard("DeepSeek-V2-Lite", 2048, 1408, 64, 6, (45, 230, 285, 345, 1650)),
    Shard("Mixtral 8x7B", 4096, 14336, 8, 2, (185, 700, 720, 1250, 9900)),
)
#: For a rehearsal: does it run at all? Sizes that the interpreter can do, FP8 blocks ragged.
TINY_SHARDS = (
    Shard("tiny", 160, 144, 4, 2, fp8_rate=True),
    Shard("more experts", 64, 48, 8, 3),
)
TINY_TOKENS = (1, 5, 20)


def floor_us(
    shard: Shard, tokens: int, hit: int, weights: Weights, chip: Chip = H200
) -> tuple[float, str]:
    """Microseconds that no kernel goes below, and whether "memory" or "compute" sets them.

    `hit` experts are read once; every token is read once and written once, in 16 bits.
    """
    weight_bytes = hit * shard.expert_elements * (2 if weights == "bf16" else 1)
    memory = (weight_bytes + 2 * 2 * tokens * shard.hidden) / chip.bytes_per_s
    rate = chip.flops_per_s * (_FP8_OVER_BF16 if weights == "w8a8" else 1)
    compute = shard.flops(tokens) / rate
    return max(memory, compute) * 1e6, "memory" if memory >= compute else "compute"


def required_us(
    shard: Shard, tokens: int, weights: Weights, floor: tuple[float, str], bf16_us: float | None,
    chip: Chip = H200,
) -> float | None:  # fmt: skip
    """Microseconds to reach; None where nothing is asked. `bf16_us` is what bf16 took."""
    if not chip.is_h200 and (weights == "bf16" or floor[1] == "compute"):
        return None
    if weights == "bf16":
        known = dict(zip(TOKENS, shard.required_us, strict=False))
        return known.get(tokens)
    if weights == "w8a8" and shard.fp8_rate and tokens == TOKENS[-1]:
        return shard.flops(tokens) / _W8A8_FLOPS_PER_S * 1e6
    if floor[1] == "memory" and floor[0] > _FP8_FROM_US and bf16_us is not None:
        return _FP8_SHARE * bf16_us
    return None
