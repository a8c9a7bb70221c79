"""What a cluster is asked for over time: tokens a second, and which experts they choose. Pure.

Shapes: N steps, P keyframes, L layers, E routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertmesh.errors import ConfigError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """Load of N steps of `step_s`, each steady within itself."""

    name: str
    step_s: float
    tokens_per_s: Floats  # [N]
    top_k: int
    popularity: Floats  # [P, L, E], which share of a layer's assignments each expert gets
    keyframes_s: Floats  # [P], when each popularity holds, the first at 0; between two a mixture

    def __post_init__(self) -> None:
        tokens, frames = self.tokens_per_s, self.popularity
        _require(0 < self.step_s < np.inf, f"step_s is {self.step_s}, expected a number above 0")
        _require(tokens.ndim == 1 and tokens.size > 0, "tokens_per_s is empty or not a list")
        _require(_counts(tokens), "tokens_per_s holds a negative or non-finite number")
        _require(
            frames.ndim == 3 and 0 not in frames.shape,
            f"popularity has shape {frames.shape}, expected [keyframes, layers, experts]",
        )
        _require(_counts(frames), "popularity holds a negative or non-finite number")
        _require(bool(np.allclose(frames.sum(2), 1.0)), "popularity does not sum to 1 in a layer")
        _require(
            self.keyframes_s.shape == frames.shape[:1],
            f"{len(frames)} popularities have {len(self.keyframes_s)} keyframes",
        )
        ascend = self.keyframes_s[0] == 0 and bool((np.diff(self.keyframes_s) > 0).all())
        _require(ascend, "keyframes do not ascend from 0")
        _require(
            1 <= self.top_k <= self.experts,
            f"top_k is {self.top_k}, expected 1 to {self.experts}, the experts of a layer",
        )
        _require(
            frames.max() * self.top_k <= 1 + 1e-9,
            f"an expert gets {frames.max():.1%} of a layer's assignments, but a token chooses it "
            f"at most once among {self.top_k}: at most {1 / self.top_k:.1%} can be its",
        )

    @property
    def layers(self) -> int:
        """L."""
        return int(self.popularity.shape[1])

    @property
    def experts(self) -> int:
        """E."""
        return int(self.popularity.shape[2])

    @property
    def duration_s(self) -> float:
        """Of all steps."""
        return len(self.tokens_per_s) * self.step_s

    def popularity_at(self, at_s: float) -> Floats:
        """[L, E]: each layer's shares at an instant; after the last keyframe they stay."""
        after = int(np.searchsorted(self.keyframes_s, at_s, side="right"))
        if after == len(self.keyframes_s):
            return np.asarray(self.popularity[-1])
        start, end = self.keyframes_s[after - 1 : after + 1]
        part = (at_s - start) / (end - start)
        return np.asarray((1 - part) * self.popularity[after - 1] + part * self.popularity[after])

    def first(self, duration_s: float) -> Trace:
        """The trace cut to about `duration_s`, at least one step."""
        steps = max(1, round(duration_s / self.step_s))
        return Trace(self.name, self.step_s, self.tokens_per_s[:steps], self.top_k,
                     self.popularity, self.keyframes_s)  # fmt: skip


def _counts(values: Floats) -> bool:
    return bool(np.isfinite(values).all() and (values >= 0).all())


def _require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise ConfigError(f"trace: {message}")
