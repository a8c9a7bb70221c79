"""From closed windows to serving deltas: one decision, no clock, no network. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from expertmesh.config import BalanceConfig
from load_controller import policy
from load_controller.ledger import Counts, Window


@dataclass
class Balancer:
    """Counts of open windows, and the serving delta of each layer."""

    config: BalanceConfig
    mode: str
    deltas: dict[int, torch.Tensor] = field(default_factory=dict)
    windows_closed: int = 0  # since the start, over all layers
    window_maxvio: dict[int, float] = field(default_factory=dict)  # of each layer's last window
    _windows: dict[int, Window] = field(default_factory=dict)

    def count(self, news: Mapping[int, Counts], top_k: Mapping[int, int], now: float) -> None:
        """Adds new assignments of router-gated requests to the open windows."""
        if self.mode == "off":
            return
        for layer, counts in news.items():
            window = self._windows.get(layer)
            if window is None:
                window = self._windows[layer] = Window(len(counts), top_k[layer], now)
            window.counts += counts

    def close_due(self, now: float) -> bool:
        """Closes the windows that are due. Whether a delta changed with them."""
        config = self.config
        changed = False
        for layer, window in list(self._windows.items()):
            if window.is_due(now, config.window_tokens, config.window_s):
                del self._windows[layer]  # the next count opens a new one
                self.windows_closed += 1
                self.window_maxvio[layer] = max_violation(window.counts)
                changed |= self.mode == "adaptive" and self._move(layer, window.counts)
        return changed

    def _move(self, layer: int, counts: Counts) -> bool:
        before = self.deltas.get(layer)
        if before is None:
            before = torch.zeros(len(counts))
        step = policy.sign if self.config.policy == "sign" else policy.proportional
        after = step(before, torch.from_numpy(counts), self.config.update_rate)
        if self.config.max_delta is not None:
            after = policy.clamp_delta(after, self.config.max_delta)
        self.deltas[layer] = after
        return not torch.equal(before, after)

    def set_mode(self, mode: str) -> None:
        """Changes the mode. Any mode but "adaptive" takes all deltas back."""
        self.mode = mode
        self._windows.clear()
        if mode != "adaptive":
            self.deltas.clear()


def max_violation(counts: Counts) -> float:
    """MaxVio of one layer's counts; 0 where nothing was counted."""
    return policy.max_violation(torch.from_numpy(np.ascontiguousarray(counts)))
