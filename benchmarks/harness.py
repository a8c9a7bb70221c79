"""What every benchmark shares: the gate, interleaved timing, ratios, result files.

No case gets a time in a report before its outputs have passed the gate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
_ROW_FACTOR = 3


class WrongOutputError(Exception):
    """The sides disagree, or were never compared: their times mean nothing."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Least, middle and largest of a sample."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f}–{self.max:.2f})"


@dataclass(frozen=True, slots=True)
class Interval:
    """The median of a sample, and where the median of all such samples lies with 95 %."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of at least six values: by how many of n draws fall below a median, whatever it is."""
        ordered, n = sorted(values), len(values)
        if n < 6:
            raise ValueError(f"{n} values say too little of their median: at least 6")
        below, cut = 0.0, 0
        while (below := below + math.comb(n, cut) / 2.0**n) <= 0.025:
            cut += 1
        return cls(ordered[cut - 1], statistics.median(ordered), ordered[n - cut])


def interleave(
    variants: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each variant in each round: A B C, C B A, A B C, ...: all meet the same noise.

    Each is called with the number of the round, warm-up rounds with negative ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(-warmup, rounds):
        turn = list(variants.items())
        for name, run in turn if index % 2 == 0 else reversed(turn):
            start = time.perf_counter()
            run(index)
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """`over` / `under`, round by round: a disturbance that hits a whole round cancels out."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """|actual - expected| / |expected|, Euclidean: of the whole, and of the worst row."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise WrongOutputError(
            f"{list(actual.shape)} {actual.dtype}, expected {list(expected.shape)} {expected.dtype}"
        )
    norm = torch.linalg.vector_norm
    off, size = actual.double() - expected.double(), expected.double()
    rows = norm(off, dim=-1) / norm(size, dim=-1)
    return float(norm(off) / norm(size)), float(rows.max())


@dataclass
class Report:
    """A table of cases, each gated before it is timed."""

    theme: str
    title: str
    command: str  # without host names or paths
    says: str  # what the table shows, and what it does not
    facts: Mapping[str, object]  # of the machine and the versions
    rows: list[dict[str, object]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def gate(
        self, case: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float
    ) -> None:
        """Raises WrongOutputError unless `actual` is `expected`; may be called again for a case.

        A single row may be off by _ROW_FACTOR times as much: far less than one missing expert.
        """
        error, worst_row = relative_error(actual, expected)
        if not (error <= tolerance and worst_row <= _ROW_FACTOR * tolerance):  # NaN is not
            raise WrongOutputError(
                f"{case}: relative error {error:.2e}, of the worst row {worst_row:.2e}; "
                f"allowed {tolerance:.0e}, of a row {_ROW_FACTOR} times that"
            )
        self.errors[case] = max(error, self.errors.get(case, 0.0))

    def add(self, case: str, **columns: object) -> None:
        """A row of results. Raises WrongOutputError for a case that has not passed the gate."""
        if case not in self.errors:
            raise WrongOutputError(f"{case}: was timed but not checked")
        self.rows.append({"case": case, **columns, "error": f"{self.errors[case]:.1e}"})

    def table(self) -> str:
        """The rows in Markdown."""
        if not self.rows:
            raise WrongOutputError("nothing has passed the gate")
        lines = [list(self.rows[0]), ["---"] * len(self.rows[0])]
        lines += [[str(value) for value in row.values()] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def markdown(self) -> str:
        """The whole page."""
        known = "\n".join(f"* {name}: {value}" for name, value in self.facts.items())
        return f"# {self.title}\n\n    {self.command}\n\n{self.table()}\n\n{self.says}\n\n{known}\n"

    def write(self, hardware: str, folder: Path = RESULTS) -> Path:
        """Writes `<theme>_<hardware>_<yyyymm>.json` and `.md`; the path without its ending."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", hardware):
            raise ValueError(f"hardware is {hardware!r}, expected a name such as 2core-epyc")
        path = folder / f"{self.theme}_{hardware}_{datetime.date.today():%Y%m}"
        path.with_suffix(".md").write_text(self.markdown())
        self.write_json(path.with_suffix(".json"))
        return path

    def publish(self, arguments: argparse.Namespace) -> None:
        """Prints the page, and writes what `output_options` ask for."""
        print(self.markdown())
        if arguments.json:
            self.write_json(arguments.json)
        if arguments.hardware:
            self.write(arguments.hardware)

    def write_json(self, path: Path) -> None:
        """Everything, for programs. A Spread becomes its three numbers."""
        whole = {"theme": self.theme, "command": self.command, "facts": dict(self.facts)}
        text = json.dumps({**whole, "rows": self.rows}, indent=1, default=_plain)
        path.write_text(text + "\n")


def output_options(parser: argparse.ArgumentParser) -> None:
    """Where results go, beside the screen."""
    parser.add_argument("--hardware", help="writes benchmarks/results, e.g. 2core-epyc")
    parser.add_argument("--json", type=Path, help="writes JSON there too")


def repeated(run: Callable[[], object], calls: int) -> Callable[[int], None]:
    """So many calls, as a variant for `interleave`."""

    def repeat(_: int) -> None:
        for _ in range(calls):
            run()

    return repeat


def _plain(value: object) -> object:
    if isinstance(value, Spread):
        return {"min": value.min, "median": value.median, "max": value.max}
    if isinstance(value, Interval):
        return {"low": value.low, "median": value.median, "high": value.high}
    raise TypeError(f"{type(value).__name__} in a report")
