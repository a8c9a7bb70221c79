"""Which keys of config.json a family reads, found by watching it read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from expertmesh.checkpoint.config import Config
from expertmesh.checkpoint.family import Family
from expertmesh.errors import CheckpointError

# What a key may also say, where another value makes a family read other keys.
BRANCHES: tuple[Mapping[str, object], ...] = (
    {},
    {"topk_method": "greedy"},
    {"topk_method": "group_limited_greedy"},
    {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "topk_method": "greedy"},
    {
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
    },
)


@dataclass(frozen=True, slots=True)
class WatchedConfig(Config):
    """A Config that notes which keys it is asked for."""

    asked: set[str] = field(default_factory=set)

    def get(self, key: str) -> object:
        """See Config.get."""
        self.asked.add(key)
        return Config.get(self, key)


def keys_read(family: Family, values: Mapping[str, object]) -> set[str]:
    """Every key that decides what experts and gates of `family` do, over all branches."""
    asked: set[str] = set()
    for branch in BRANCHES:
        config = WatchedConfig(Path("config.json"), {**values, **branch}, family.defaults, asked)
        try:
            config.size("hidden_size")
            for index in range(config.size("num_hidden_layers")):
                family.layer_spec(config, index)
            config.expect(family.expects)
        except CheckpointError:  # a branch that this family has not
            continue
    return asked


def other_values(value: object) -> Iterator[object]:
    """Values that differ from `value` and that the same key could have."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        yield value * 2 or 2
        if value > 1:
            yield value // 2
    elif isinstance(value, float):
        yield value * 2 or 1.0
        yield value + 1e-3
    elif isinstance(value, list):
        yield sorted({*value} ^ {0, 1})
    elif isinstance(value, str):
        yield "gelu" if value == "silu" else "other"
