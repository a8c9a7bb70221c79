"""From closed windows to serving deltas: one decision, no clock, no network. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from expertmesh.config import BalanceConfig
from load_controller import policy
from load_controller.divergence import UNMEASURED, Gate, HeldSamples, Share, Verdict, judge
from load_controller.ledger import Counts, Window

_STALE_WINDOWS = 10  # a router that sampled nothing for this many windows does not judge


@dataclass(frozen=True)
class Progress:
    """What must survive a restart of one layer's adaptation."""

    delta: torch.Tensor  # [E] float32
    windows: int  # closed since the delta was zero: the place in the rate's schedule


@dataclass
class LayerState:
    """One layer's delta, and how it is doing."""

    delta: torch.Tensor
    samples: HeldSamples
    windows: int = 0
    window: Window | None = None  # the open one
    violation: float = 0.0  # MaxVio of the last closed window
    measured: Share = UNMEASURED  # live divergence in the last closed window
    measuring: Share = UNMEASURED  # the same in the open one
    halvings: int = 0
    withdrawals: int = 0


@dataclass
class Balancer:
    """Every layer's open window, sample and serving delta."""

    config: BalanceConfig
    mode: str
    gates: dict[int, Gate] = field(default_factory=dict)
    closed_windows: int = 0
    closed_at: float | None = None
    layers: dict[int, LayerState] = field(default_factory=dict)

    # What comes in.

    def restore(self, progress: Mapping[int, Progress]) -> None:
        """Takes up what had been published."""
        for layer, each in progress.items():
            state = self._layer(layer, len(each.delta))
            state.delta, state.windows = each.delta, each.windows

    def count(self, news: Mapping[int, Counts], top_k: Mapping[int, int], now: float) -> None:
        """Adds new assignments of router-gated requests to the open windows."""
        if self.mode == "off":
            return
        for layer, counts in news.items():
            state = self._layer(layer, len(counts))
            if state.window is None and counts.any():
                state.window = Window(len(counts), top_k[layer], now)
            if state.window is not None:
                state.window.counts += counts

    def sample(
        self, source: str, layer: int, scores_TE: torch.Tensor, live: Share, now: float
    ) -> bool:
        """Takes newly sampled rows, and what they were served. Whether the delta was cut for it.

        The published delta is judged again where the live share is above the ceiling: traffic that
        has changed need not wait for its window to close.
        """
        state = self._layer(layer, scores_TE.shape[1])
        if len(scores_TE):
            state.samples.add(source, scores_TE, now)
        before = state.measuring
        state.measuring = Share(before.changed + live.changed, before.picks + live.picks)
        ceiling = self.config.divergence_ceiling
        if ceiling is None or live.upper <= ceiling:
            return False
        return self._replace(state, self._judged(layer, state, state.delta))

    def forget(self, source: str) -> None:
        """That router is gone, and its samples with it."""
        for state in self.layers.values():
            state.samples.drop(source)

    # What comes out.

    def close_due(self, now: float) -> bool:
        """Closes the windows that are due. Whether a delta changed with them."""
        changed = False
        for layer, state in self.layers.items():
            window = state.window
            if window is not None and window.is_due(
                now, self.config.window_tokens, self.config.window_s
            ):
                changed |= self._close(layer, state, window.counts, now)
        return changed

    def _close(self, layer: int, state: LayerState, counts: Counts, now: float) -> bool:
        state.window = None  # the next count opens a new one
        state.violation = max_violation(counts)
        state.measured, state.measuring = state.measuring, UNMEASURED
        self.closed_windows += 1
        self.closed_at = now
        if self.mode != "adaptive":
            return False
        config = self.config
        rate = policy.scheduled_rate(
            config.schedule,
            config.update_rate,
            state.windows,
            over=config.schedule_windows,
            floor=config.update_rate_floor,
        )
        candidate = policy.next_delta(
            state.delta,
            torch.from_numpy(counts),
            policy=config.policy,
            update_rate=rate,
            decay=config.decay,
            max_delta=config.max_delta,
        )
        state.windows += 1
        return self._replace(state, self._judged(layer, state, candidate))

    def _judged(self, layer: int, state: LayerState, candidate: torch.Tensor) -> torch.Tensor:
        """What of a candidate may be published; what is, where there is nothing to judge by."""
        ceiling = self.config.divergence_ceiling
        if ceiling is None:
            return candidate
        gate, samples = self.gates.get(layer), state.samples.usable()
        if gate is None or not samples:
            return state.delta
        verdict: Verdict = judge(candidate, gate, samples, ceiling)
        state.halvings += verdict.halvings
        state.withdrawals += verdict.withdrawn
        return verdict.delta

    def _replace(self, state: LayerState, delta: torch.Tensor) -> bool:
        changed = not torch.equal(state.delta, delta)
        state.delta = delta
        return changed

    def progress(self) -> dict[int, Progress]:
        """What is published: every layer whose delta has moved."""
        return {
            layer: Progress(state.delta, state.windows)
            for layer, state in self.layers.items()
            if state.windows
        }

    def set_mode(self, mode: str, reset: bool) -> None:
        """Changes the mode. Any mode but "adaptive", or `reset`, takes all deltas back."""
        self.mode = mode
        for state in self.layers.values():
            state.window, state.measuring = None, UNMEASURED
            if reset or mode != "adaptive":
                state.delta = torch.zeros_like(state.delta)
                state.windows = state.halvings = state.withdrawals = 0
                state.measured = UNMEASURED

    def _layer(self, layer: int, experts: int) -> LayerState:
        state = self.layers.get(layer)
        if state is None:
            stale_s = _STALE_WINDOWS * self.config.window_s
            state = LayerState(torch.zeros(experts), HeldSamples(stale_s))
            self.layers[layer] = state
        return state


def max_violation(counts: Counts) -> float:
    """MaxVio of one layer's counts; 0 where nothing was counted."""
    return policy.max_violation(torch.from_numpy(np.ascontiguousarray(counts)))
