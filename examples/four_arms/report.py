"""Make the table and the plots of the four arms from the runs that have ended.

    python -m examples.four_arms.report build/four_arms [--hardware 2core-epyc]

The table goes to standard output; with `--hardware` it goes to `benchmarks/results/`, to the page
docs/training.md between its markers, and the plots to docs/images/. Nothing is trained here, and
runs that are missing are said to be missing.
"""

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.four_arms.arms import ARMS
from examples.four_arms.plots import draw_balance, draw_learning, smoothed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- four arms: begin -->", "<!-- four arms: end -->"
TAIL = 4  # MaxVio of training batches is the mean over the last 1/TAIL of them

#: What arXiv 2408.15664, table 2, reports of 1B models: perplexity per token, MaxVio global.
PAPER = {"sigmoid_aux": ("9.56", "0.72"), "loss_free": ("9.50", "0.04")}


@dataclass(frozen=True)
class Run:
    """One arm with one seed, as `train` wrote it down."""

    arm: str
    seed: int
    tokens: int
    cpu_tokens_per_s: float
    perplexity: float  # per held-out byte
    maxvio_global: float  # held-out, mean over the layers
    maxvio_held_out_batch: float
    maxvio_batch: float  # of training batches, mean over the last quarter
    nats: list[float]  # of each step
    maxvio: list[float]  # of each step's batch
    shape: dict[str, float]

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Raises KeyError or ValueError where the file is not one of `train`."""
        raw = json.loads(path.read_text())
        held_out, steps = raw["held_out"], raw["train_maxvio"]
        return cls(
            arm=raw["arm"],
            seed=raw["seed"],
            tokens=raw["tokens"],
            cpu_tokens_per_s=raw["cpu_tokens_per_s"],
            perplexity=math.exp(held_out["nats_per_byte"]),
            maxvio_global=statistics.fmean(held_out["maxvio_global"]),
            maxvio_held_out_batch=held_out["maxvio_batch"],
            maxvio_batch=statistics.fmean(steps[-max(1, len(steps) // TAIL) :]),
            nats=raw["train_nats"],
            maxvio=steps,
            shape=raw["shape"]
            | {"weights": raw["weights"], "held_out_bytes": raw["held_out_bytes"]},
        )


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """The runs that have ended, by arm in the order of the table, by seed within an arm."""
    runs = [Run.read(path) for path in sorted(folder.glob("*-*.json"))]
    return {
        arm: sorted((run for run in runs if run.arm == arm), key=lambda run: run.seed)
        for arm in ARMS
        if any(run.arm == arm for run in runs)
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and in brackets the least and the largest."""
    middle, low, high = statistics.fmean(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(by_arm: dict[str, list[Run]]) -> str:
    """The arms in Markdown, what is missing, and the paper's column beside ours."""
    heads = [
        "arm", "seeds", "perplexity per byte", "beside no balancing", "MaxVio global",
        "MaxVio per batch, held out", "MaxVio per batch, training",
        "paper's 1B: perplexity / MaxVio",
    ]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    base = {run.seed: run.perplexity for run in by_arm.get("none", [])}
    for arm, runs in by_arm.items():
        gains = [100 * (run.perplexity / base[run.seed] - 1) for run in runs if run.seed in base]
        lines.append(
            [
                ARMS[arm].label,
                str(len(runs)),
                spread([run.perplexity for run in runs], 3),
                f"{statistics.fmean(gains):+.2f} %" if gains and arm != "none" else "",
                spread([run.maxvio_global for run in runs], 3),
                spread([run.maxvio_held_out_batch for run in runs], 3),
                spread([run.maxvio_batch for run in runs], 3),
                " / ".join(PAPER.get(arm, ("not reported",))),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts(by_arm: dict[str, list[Run]], seeds: int = 3) -> str:
    """One paragraph on what ran, from the runs themselves."""
    runs = [run for each in by_arm.values() for run in each]
    shape, tokens = runs[0].shape, {run.tokens for run in runs}
    missing = [
        f"{arm} with seed {seed}"
        for seed in range(seeds)
        for arm in ARMS
        if seed not in {run.seed for run in by_arm.get(arm, [])}
    ]
    speeds = [run.cpu_tokens_per_s for run in runs]
    said = (
        f"{len(runs)} runs of {' or '.join(f'{each:,}' for each in sorted(tokens))} bytes each: "
        f"{shape['layers']:.0f} layers of {shape['experts']:.0f} experts, "
        f"{shape['top_k']:.0f} chosen and one shared, hidden {shape['hidden']:.0f}, "
        f"{shape['weights']:,} weights, batches of {shape['windows_a_step']:.0f} windows of "
        f"{shape['context']:.0f} bytes; {min(speeds):,.0f} to {max(speeds):,.0f} bytes a second of "
        f"CPU time on one thread. Perplexity is e to the mean cross-entropy of "
        f"{shape['held_out_bytes']:,} held-out bytes. Cells are mean (least–largest) over seeds; "
        f"MaxVio is the mean over layers; a held-out batch is of neighbouring windows, a training "
        f"batch of windows from everywhere, as many in each, and the last quarter of them counts."
    )
    return said + (f" Missing: {', '.join(missing)}." if missing else "")


def findings(by_arm: dict[str, list[Run]]) -> list[str]:
    """What the runs say, each sentence from the numbers and none where they are not there."""
    said = []
    pairs = _paired(by_arm, "loss_free", "sigmoid_aux")
    if pairs:
        better = sum(a.perplexity < b.perplexity for a, b in pairs)
        more_even = sum(a.maxvio_global < b.maxvio_global for a, b in pairs)
        change = statistics.fmean(100 * (a.perplexity / b.perplexity - 1) for a, b in pairs)
        said.append(
            f"Loss-free beside the auxiliary loss (both sigmoid), seed by seed: more even in "
            f"{more_even} of {len(pairs)}, lower perplexity in {better} of {len(pairs)}, "
            f"{change:+.2f} % on average (the paper's 1B: {100 * (9.50 / 9.56 - 1):+.2f} %)."
        )
    for arm in ("gshard", "sigmoid_aux", "loss_free"):
        pairs = _paired(by_arm, arm, "none")
        if pairs:
            factor = statistics.fmean(b.maxvio_global / a.maxvio_global for a, b in pairs)
            said.append(
                f"{ARMS[arm].label}: MaxVio global is 1 / {factor:.1f} of that without balancing."
            )
    if len(by_arm.get("none", [])) > 1:
        values = [run.perplexity for run in by_arm["none"]]
        size = 100 * (max(values) - min(values)) / statistics.fmean(values)
        said.append(
            f"Between seeds, perplexity without balancing differs by {size:.2f} %: a smaller "
            "difference between arms that changes its sign with the seed is none."
        )
    return said


def _paired(by_arm: dict[str, list[Run]], one: str, other: str) -> list[tuple[Run, Run]]:
    """The runs of two arms with the same seed."""
    others = {run.seed: run for run in by_arm.get(other, [])}
    return [(run, others[run.seed]) for run in by_arm.get(one, []) if run.seed in others]


def markdown(by_arm: dict[str, list[Run]]) -> str:
    """Everything that comes from the runs."""
    listed = "\n".join(f"* {sentence}" for sentence in findings(by_arm))
    return f"{table(by_arm)}\n\n{facts(by_arm)}\n\n{listed}\n"


def between_markers(page: str, text: str) -> str:
    """The page with what stands between its markers replaced. Raises ValueError without them."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def thinned(run: Run) -> dict[str, object]:
    """A run for programs, its curves as means of SMOOTHED steps."""
    curves = {"nats": smoothed(run.nats), "maxvio": smoothed(run.maxvio)}
    return vars(run) | {
        name: [round(value, 4) for value in curve] for name, curve in curves.items()
    }


def _result_name(hardware: str) -> str:
    return f"four-arms_{hardware}_{datetime.date.today():%Y%m}"


def main() -> None:
    """Read the runs, print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where `train` has written")
    parser.add_argument("--hardware", help="writes results, page and plots, e.g. 2core-epyc")
    args = parser.parse_args()
    by_arm = read_runs(args.folder)
    if not by_arm:
        parser.error(f"no run has ended in {args.folder}")
    text = markdown(by_arm)
    print(text)
    if args.hardware:
        path = ROOT / "benchmarks" / "results" / _result_name(args.hardware)
        path.with_suffix(".md").write_text(
            "# One small decoder balanced in four ways\n\n"
            "    python -m examples.four_arms.train && python -m examples.four_arms.report\n\n"
            f"{text}\ndocs/training.md says what this can and cannot show.\n"
        )
        whole = {arm: [thinned(run) for run in runs] for arm, runs in by_arm.items()}
        path.with_suffix(".json").write_text(json.dumps(whole) + "\n")
        PAGE.write_text(between_markers(PAGE.read_text(), text))
        draw_balance(ROOT / "docs" / "images" / "four_arms_balance.png", by_arm)
        draw_learning(ROOT / "docs" / "images" / "four_arms_learning.png", by_arm)


if __name__ == "__main__":
    main()
