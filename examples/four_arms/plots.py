"""Pictures of the four arms: balance and perplexity at the end, and both along the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from examples.four_arms.arms import ARMS

_COLOURS = {"gshard": "C1", "sigmoid_aux": "C0", "loss_free": "C2", "none": "0.45"}
SMOOTHED = 50  # steps of one point of a curve


class Drawable(Protocol):
    """What of a run is drawn."""

    perplexity: float
    maxvio_global: float
    nats: list[float]
    maxvio: list[float]


def smoothed(values: Sequence[float], every: int = SMOOTHED) -> list[float]:
    """Means of consecutive pieces; the last one may be shorter."""
    pieces = [values[at : at + every] for at in range(0, len(values), every)]
    return [sum(piece) / len(piece) for piece in pieces]


def draw_balance(path: Path, by_arm: Mapping[str, Sequence[Drawable]]) -> None:
    """Held-out perplexity over held-out MaxVio, one point a run."""
    figure, panel = _figure(1, (6.4, 4.2))
    for arm, runs in by_arm.items():
        panel[0].scatter(
            [run.maxvio_global for run in runs], [run.perplexity for run in runs],
            color=_COLOURS[arm], label=ARMS[arm].label, s=32,
        )  # fmt: skip
    panel[0].set(
        xscale="log", xlabel="MaxVio global, held out, mean over layers",
        ylabel="perplexity per held-out byte", title="One point a seed: lower left is better",
    )  # fmt: skip
    panel[0].legend(fontsize=8, framealpha=0.9, loc="upper center")
    _plain(panel[0].xaxis, (0.05, 0.1, 0.2, 0.5, 1, 2, 4))
    _save(figure, path)


def draw_learning(path: Path, by_arm: Mapping[str, Sequence[Drawable]]) -> None:
    """MaxVio of training batches, and the perplexity of what is learned from, over the steps."""
    figure, panels = _figure(2, (10.5, 4.0))
    for arm, runs in by_arm.items():
        for index, run in enumerate(runs):
            style = {"color": _COLOURS[arm], "lw": 1.1, "alpha": 0.9}
            label = ARMS[arm].label if index == 0 else None
            steps = [SMOOTHED * (at + 1) for at in range(len(smoothed(run.maxvio)))]
            panels[0].plot(steps, smoothed(run.maxvio), label=label, **style)
            panels[1].plot(steps, [math.exp(nats) for nats in smoothed(run.nats)], **style)
    panels[0].set(yscale="log", xlabel="step", ylabel=f"MaxVio of a batch, mean of {SMOOTHED}")
    panels[1].set(yscale="log", xlabel="step", ylabel="perplexity per training byte")
    _plain(panels[0].yaxis, (0.2, 0.5, 1, 2, 4))
    _plain(panels[1].yaxis, (3.5, 5, 10, 20, 40))
    panels[1].legend(*panels[0].get_legend_handles_labels(), fontsize=8, framealpha=0.9)
    _save(figure, path)


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _plain(axis: Any, ticks: Sequence[float]) -> None:
    """These ticks of a logarithmic axis, as plain numbers."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
