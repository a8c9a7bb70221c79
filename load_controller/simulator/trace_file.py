"""Traces from files: JSON or CSV, given as text. Pure.

JSON, with the popularity written out or Zipf's:

    {"format": "expertmesh-trace-1", "step_s": 60, "top_k": 8,
     "tokens_per_s": [120000, 125000, ...],
     "popularity": {"keyframes_s": [0, 3600], "shares": [[[0.1, ...], ...], ...]}}

    {"format": "expertmesh-trace-1", "step_s": 60, "top_k": 8, "tokens_per_s": [...],
     "zipf": {"experts": 256, "layers": 2, "exponent": 0.8, "seed": 1, "drift_s": 0}}

`shares` is [keyframes][layers][experts]; each layer's are divided by their sum, so counts do as
well. Between two keyframes the shares move evenly.

CSV is for a curve alone: a header `at_s,tokens_per_s`, then evenly spaced rows. Its popularity is
Zipf's with the parameters that a leading line like `# experts=256,top_k=8` gives.
"""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np

from expertmesh.errors import ConfigError
from load_controller.simulator.generators import parameters_of, popularity_of
from load_controller.simulator.trace import Floats, Trace

FORMAT = "expertmesh-trace-1"
_ZIPF = ("experts", "layers", "exponent", "seed", "drift_s")


def parse_trace(text: str, name: str) -> Trace:
    """The trace that a file holds; `name` is for messages. Raises ConfigError."""
    try:
        if text.lstrip().startswith("{"):
            return _from_json(json.loads(text), name)
        return _from_csv(text, name)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{name} is not a trace: {what}; docs/placement.md has the formats"
        ) from None


def _from_json(raw: dict[str, Any], name: str) -> Trace:
    if raw.get("format") != FORMAT:
        raise ValueError(f"its format is {raw.get('format')!r}, expected {FORMAT!r}")
    known = {"format", "step_s", "top_k", "tokens_per_s", "popularity", "zipf"}
    if unknown := raw.keys() - known:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    tokens, step_s = np.asarray(raw["tokens_per_s"], np.float64), float(raw["step_s"])
    if "popularity" in raw:
        shares = np.asarray(raw["popularity"]["shares"], np.float64)
        keyframes_s = np.asarray(raw["popularity"].get("keyframes_s", [0.0]), np.float64)
        if shares.ndim != 3 or not (shares.sum(2) > 0).all():
            raise ValueError("popularity.shares are not [keyframes][layers][experts] with a load")
        shares = shares / shares.sum(2, keepdims=True)
    else:
        if unknown := raw["zipf"].keys() - set(_ZIPF):
            raise ValueError(f"unknown in zipf: {', '.join(sorted(unknown))}")
        given = ",".join(f"{key}={value}" for key, value in raw["zipf"].items())
        shares, keyframes_s = _zipf(given, len(tokens) * step_s)
    return Trace(name, step_s, tokens, int(raw["top_k"]), shares, keyframes_s)


def _from_csv(text: str, name: str) -> Trace:
    lines = text.strip().splitlines()
    given = "".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if len(rows) < 2 or set(rows[0]) != {"at_s", "tokens_per_s"}:
        raise ValueError("expected a header at_s,tokens_per_s and at least two rows")
    at_s = np.array([float(row["at_s"]) for row in rows])
    steps = np.diff(at_s)
    if at_s[0] != 0 or not (steps > 0).all() or not np.allclose(steps, steps[0]):
        raise ValueError("at_s does not rise evenly from 0")
    tokens = np.array([float(row["tokens_per_s"]) for row in rows])
    shares, keyframes_s = _zipf(given, len(tokens) * float(steps[0]))
    top_k = parameters_of(given).top_k
    return Trace(name, float(steps[0]), tokens, top_k, shares, keyframes_s)


def _zipf(given: str, duration_s: float) -> tuple[Floats, Floats]:
    return popularity_of(parameters_of(f"{given},hours={duration_s / 3600}".lstrip(",")))
