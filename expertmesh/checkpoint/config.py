"""config.json, read with types and defaults; every error names the file, the key and the value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from expertmesh.errors import CheckpointError

# One quantity, several spellings: transformers renamed some keys and writes either.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_local_experts",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "num_local_experts": ("num_experts",),
    "dtype": ("torch_dtype",),
}


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of one config.json. A key that is absent or null has its family's default."""

    path: Path
    values: Mapping[str, object]
    defaults: Mapping[str, object] = field(default_factory=dict)

    def get(self, key: str) -> object:
        """The value, the default, or None."""
        for name in (key, *_ALIASES.get(key, ())):
            if self.values.get(name) is not None:
                return self.values[name]
        return self.defaults.get(key)

    def size(self, key: str) -> int:
        """An integer of at least 1."""
        value = self.count(key)
        return value if value else self._refuse(key, value, "at least 1")

    def count(self, key: str) -> int:
        """An integer of at least 0."""
        value = self.get(key)
        if type(value) is int and value >= 0:
            return value
        return self._refuse(key, value, "an integer of 0 or more")

    def counts(self, key: str) -> Sequence[int]:
        """A list of integers of at least 0."""
        value = self.get(key)
        if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value):
            return value
        return self._refuse(key, value, "a list of integers")

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        return self._refuse(key, value, "a number")

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        return value if isinstance(value, bool) else self._refuse(key, value, "true or false")

    def one_of(self, key: str, *choices: str) -> str:
        """One of the given texts."""
        value = self.get(key)
        if isinstance(value, str) and value in choices:
            return value
        return self._refuse(key, value, " or ".join(choices))

    def expect(self, expected: Mapping[str, object]) -> None:
        """Refuses a key that is present with another value than the only one served."""
        for key, wanted in expected.items():
            value = self.get(key)
            if value is not None and value != wanted:
                self._refuse(key, value, repr(wanted))

    def _refuse(self, key: str, value: object, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {key} is {value!r}, expected {expected}")
