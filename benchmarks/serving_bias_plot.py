"""The trade-off of `bench_serving_bias.py` as a picture: what the text pays for the balance.

python benchmarks/serving_bias_plot.py RESULT.json PICTURE.png, to draw it anew
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import Spread

_COLOURS = {"frozen": "0.3", "max_delta": "C0", "ceiling": "C1", "adaptive": "C3"}


def draw_trade_off(path: Path, rows: Sequence[Mapping[str, object]], mix: str) -> None:
    """Bits per byte and divergence over MaxVio, one point a setting, bars from least to largest."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for panel, column, label in (
        (panels[0], "more than frozen", "bits per byte more than frozen"),
        (panels[1], "divergence", "picks that the trained bias would not make"),
    ):
        for row in rows:
            x, y = row["MaxVio"], row[column]
            assert isinstance(x, Spread)
            assert isinstance(y, Spread)
            case = str(row["case"])
            panel.errorbar(
                x.median, y.median, fmt="o", ms=5, lw=1, capsize=2,
                xerr=[[x.median - x.min], [x.max - x.median]],
                yerr=[[y.median - y.min], [y.max - y.median]],
                color=_COLOURS[case.split()[0]],
            )  # fmt: skip
            # Clamps are named to the left of the curve, ceilings to the right: neighbours overlap.
            clamp = case.startswith("max_delta")
            place = {"xytext": (-6, -3), "ha": "right", "va": "top"} if clamp else {
                "xytext": (4, 4), "rotation": 40}  # fmt: skip
            panel.annotate(case, (x.median, y.median), fontsize=8,
                           textcoords="offset points", **place)  # fmt: skip
        panel.set(xlabel="MaxVio, mean over layers", ylabel=label)
        panel.margins(x=0.16, y=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"The example model served on {mix}: balance against text", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draws the rows of a result file."""
    result = json.loads(Path(sys.argv[1]).read_text())
    rows = [
        {name: Spread(**cell) if isinstance(cell, dict) else cell for name, cell in row.items()}
        for row in result["rows"]
    ]
    draw_trade_off(Path(sys.argv[2]), rows, result["theme"].removeprefix("serving-bias-"))


if __name__ == "__main__":
    main()
