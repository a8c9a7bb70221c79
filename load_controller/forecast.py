"""What load to plan for: an exponential average of closed windows. Pure; numpy only.

With x_n the counts of the n-th window (any shape, for example [L, E]) and a half-life of h windows,

    a = 2 ** (-1 / h)        s_n = a * s_(n-1) + (1 - a) * x_n        s_0 = 0
                             w_n = a * w_(n-1) + (1 - a)              w_0 = 0
    forecast = s_n / w_n

A window that is h windows old weighs half of the newest. w_n = 1 - a**n corrects the start, so the
first forecast is the first window, and equal windows forecast themselves. A long h holds still in
noise, a short one follows drift: MoE load was seen stable over tens to hundreds of iterations, and
to change with the data set (TensorRT-LLM, blog 4), so plan slower than that noise. DeepSeek's EPLB
leaves prediction to its caller and suggests a moving average.

Counts are in tokens of one window: windows of equal length weigh time equally, windows of equal
token counts weigh tokens equally. Planning looks at ratios only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Forecast:
    """The average so far. Never changed, only replaced."""

    sums: npt.NDArray[np.float64]  # s_n
    weight: float  # w_n, in (0, 1]

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """What the next window is expected to count."""
        return np.asarray(self.sums / self.weight)


def observe(before: Forecast | None, window: npt.ArrayLike, half_life: float) -> Forecast:
    """The forecast after one more window; `before` is None for the first, `half_life` in windows.

    An empty window lowers what is expected and leaves the experts' proportions as they were.
    """
    if not half_life > 0:
        raise ValueError(f"half_life is {half_life}, expected a number of windows above 0")
    counts = np.asarray(window, np.float64)
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError("a window holds a negative or non-finite count")
    keep = 0.5 ** (1.0 / half_life)
    if before is None:
        return Forecast((1.0 - keep) * counts, 1.0 - keep)
    if before.sums.shape != counts.shape:
        raise ValueError(
            f"a window of shape {counts.shape} follows windows of shape {before.sums.shape}"
        )
    return Forecast(keep * before.sums + (1.0 - keep) * counts, keep * before.weight + (1.0 - keep))
