"""From closed windows to serving deltas: one decision, no clock, no network. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from expertmesh.config import BalanceConfig
from load_controller import policy
from load_controller.divergence import (
    UNMEASURED,
    Candidate,
    Gate,
    HeldSamples,
    Share,
    judge_all,
    own_choices,
)
from load_controller.ledger import Counts, Window

#: Windows closed in one turn: each costs up to half a millisecond where it is judged, and a model's
#: layers are due together, while announcements and watches wait for the turn's end.
_CLOSED_AT_ONCE = 16
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

    def copy(self) -> LayerState:
        """The same, which later counts do not change; samples are shared: they stay true."""
        window = self.window
        return replace(self, window=None if window is None else window.copy())


@dataclass(frozen=True)
class Before:
    """How a balancer was, for a decision that comes to nothing."""

    mode: str
    closed_windows: int
    closed_at: float | None
    layers: dict[int, LayerState]


@dataclass
class Balancer:
    """Every layer's open window, sample and serving delta."""

    config: BalanceConfig
    mode: str
    gates: dict[int, Gate] = field(default_factory=dict)
    closed_windows: int = 0
    closed_at: float | None = None
    layers: dict[int, LayerState] = field(default_factory=dict)

    def now(self) -> Before:
        """How it is, to be given to `take_back`."""
        layers = {layer: state.copy() for layer, state in self.layers.items()}
        return Before(self.mode, self.closed_windows, self.closed_at, layers)

    def take_back(self, before: Before) -> None:
        """What was counted and decided since could not be stored: it is as it was."""
        self.mode, self.layers = before.mode, before.layers
        self.closed_windows, self.closed_at = before.closed_windows, before.closed_at

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

    def sample_all(
        self,
        source: str,
        scores: Mapping[int, torch.Tensor],
        live: Mapping[int, Share],
        now: float,
    ) -> bool:
        """`sample` for every layer of a report, which is cheaper together."""
        owns: dict[int, torch.Tensor] = {}
        if self.config.divergence_ceiling is not None:
            known = {layer: each for layer, each in scores.items() if layer in self.gates}
            masks = own_choices([(each, self.gates[layer]) for layer, each in known.items()])
            owns = dict(zip(known, masks, strict=True))
        cut = False
        for layer, scores_TE in scores.items():
            share, own_TE = live.get(layer, UNMEASURED), owns.get(layer)
            cut |= self.sample(source, layer, scores_TE, share, now, own_TE)
        return cut

    def sample(
        self,
        source: str,
        layer: int,
        scores_TE: torch.Tensor,
        live: Share,
        now: float,
        own_TE: torch.Tensor | None = None,
    ) -> bool:
        """Takes newly sampled rows, and what they were served. Whether the delta was cut for it.

        The published delta is judged again where the live share is above the ceiling: traffic that
        has changed need not wait for its window to close.
        """
        state = self._layer(layer, scores_TE.shape[1])
        if len(scores_TE):
            state.samples.add(source, scores_TE, now, own_TE)
        before = state.measuring
        state.measuring = Share(before.changed + live.changed, before.picks + live.picks)
        ceiling = self.config.divergence_ceiling
        if ceiling is None or live.upper <= ceiling:
            return False
        return self._publish({layer: state.delta})

    def forget(self, source: str) -> None:
        """That router is gone, and its samples with it."""
        for state in self.layers.values():
            state.samples.drop(source)

    # What comes out.

    def close_due(self, now: float) -> bool:
        """Closes the windows that are due, some of them. Whether a delta changed with them.

        Those that have been open longest go first; the others are closed by the next calls, with
        what was counted until then.
        """
        candidates = {}
        for layer, window in self._due(now)[:_CLOSED_AT_ONCE]:
            state = self.layers[layer]
            self._close(state, window.counts, now)
            if self.mode == "adaptive":
                candidates[layer] = self._candidate(state, window.counts)
        return self._publish(candidates)

    def is_due(self, now: float) -> bool:
        """Whether `close_due` has something to close."""
        return bool(self._due(now))

    def _due(self, now: float) -> list[tuple[int, Window]]:
        """Windows that shall be closed, by layer, the oldest first."""
        tokens, seconds = self.config.window_tokens, self.config.window_s
        due = [
            (layer, state.window)
            for layer, state in self.layers.items()
            if state.window is not None and state.window.is_due(now, tokens, seconds)
        ]
        return sorted(due, key=lambda each: each[1].opened_at)

    def _close(self, state: LayerState, counts: Counts, now: float) -> None:
        state.window = None  # the next count opens a new one
        state.violation = max_violation(counts)
        state.measured, state.measuring = state.measuring, UNMEASURED
        self.closed_windows += 1
        self.closed_at = now

    def _candidate(self, state: LayerState, counts: Counts) -> torch.Tensor:
        """The delta that a closed window asks for."""
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
        return candidate

    def _publish(self, deltas: Mapping[int, torch.Tensor]) -> bool:
        """Takes over what may be published of these deltas, by layer. Whether any changed."""
        ceiling = self.config.divergence_ceiling
        if ceiling is not None:
            deltas = self._judged(deltas, ceiling)
        changed = [self._replace(self.layers[layer], delta) for layer, delta in deltas.items()]
        return any(changed)

    def _judged(
        self, deltas: Mapping[int, torch.Tensor], ceiling: float
    ) -> dict[int, torch.Tensor]:
        """These deltas, cut; without those that there is nothing to judge by."""
        candidates = {}
        for layer, delta in deltas.items():
            gate, samples = self.gates.get(layer), self.layers[layer].samples.usable()
            if gate is not None and samples:
                candidates[layer] = Candidate(delta, gate, samples)
        verdicts = judge_all(list(candidates.values()), ceiling)
        for layer, verdict in zip(candidates, verdicts, strict=True):
            self.layers[layer].halvings += verdict.halvings
            self.layers[layer].withdrawals += verdict.withdrawn
        return {layer: each.delta for layer, each in zip(candidates, verdicts, strict=True)}

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
            state = LayerState(
                torch.zeros(experts, dtype=torch.float32, device="cpu"), HeldSamples(stale_s)
            )
            self.layers[layer] = state
        return state


def max_violation(counts: Counts) -> float:
    """MaxVio of one layer's counts; 0 where nothing was counted."""
    return policy.max_violation(torch.from_numpy(np.ascontiguousarray(counts)))
