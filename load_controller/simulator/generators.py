"""Traces by name: NAME or NAME:KEY=VALUE,KEY=VALUE. Pure, and the same for the same seed.

`steady`     the same load throughout
`day`        a day: a curve with `mean_share` of its peak as mean, and bursts on top of it
`deepseek`   a day of which only the published mean and peak are real (see `_deepseek`)

Popularity is Zipf's, E(rank) ~ 1 / rank ** exponent, over experts shuffled in every layer. With
`drift_s` the order is another after so long, and between the two orders it moves evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from expertmesh.errors import ConfigError
from load_controller.simulator.trace import Floats, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What a generator can be given, as in `day:peak=2e6,bursts=0`."""

    seed: int = 1
    hours: float = 24.0
    step_s: float = 10.0
    peak: float = 1e6  # tokens a second at the curve's peak, bursts left out
    mean_share: float = 0.5  # mean of the curve over its peak
    low_share: float = 0.2  # least of the curve over its peak
    bursts: int = 24  # of the day, each in a random place of its own equal part of it
    burst_s: float = 300.0
    burst_factor: float = 2.0  # over the curve
    within_peak: bool = False  # bursts only where they stay below the curve's peak
    noise: float = 0.02  # relative, of each step
    layers: int = 2  # planned one by one; a few stand for all
    experts: int = 256
    top_k: int = 8
    exponent: float = 0.8  # of Zipf's law
    drift_s: float = 0.0  # 0: no drift


def make_trace(text: str) -> Trace:
    """The trace that a name and parameters stand for. Raises ConfigError."""
    name, _, rest = text.partition(":")
    if name not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise ConfigError(f"there is no trace {name!r}: name a file or one of {known}")
    return GENERATORS[name](text, parameters_of(rest, DEFAULTS.get(name)))


def parameters_of(text: str, default: Parameters | None = None) -> Parameters:
    """Parameters from "KEY=VALUE,KEY=VALUE". Raises ConfigError."""
    default = default or Parameters()
    kinds = {field.name: type(getattr(default, field.name)) for field in fields(Parameters)}
    given: dict[str, object] = {}
    for pair in filter(None, text.split(",")):
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in kinds:
            known = ", ".join(kinds)
            raise ConfigError(f"a trace has no parameter {key!r}: expected one of {known}")
        given[key] = _value(key, value, kinds[key])
    parameters = replace(default, **given)  # type: ignore[arg-type]
    _check(parameters)
    return parameters


def _value(key: str, text: str, kind: type) -> object:
    try:
        number = float({"true": "1", "false": "0"}.get(text, text))
    except ValueError:
        raise ConfigError(f"{key} is {text!r}, expected a number") from None
    if kind is not float and not number.is_integer():
        raise ConfigError(f"{key} is {text!r}, expected a whole number")
    return kind(number)


def _check(p: Parameters) -> None:
    steps = p.hours * 3600 / p.step_s if p.step_s > 0 else 0
    for name, good in {
        "step_s": p.step_s > 0,
        "hours": 1 <= steps <= 1e6,
        "peak": p.peak > 0,
        "mean_share": 0 < p.mean_share <= 1,
        "low_share": 0 <= p.low_share <= p.mean_share,
        "bursts": p.bursts >= 0,
        "burst_s": p.burst_s > 0,
        "burst_factor": p.burst_factor >= 1,
        "noise": 0 <= p.noise < 0.5,
        "layers": p.layers >= 1,
        "experts": p.experts >= 1,
        "exponent": p.exponent >= 0,
        "drift_s": p.drift_s >= 0,
    }.items():
        if not good:
            raise ConfigError(f"{name} is {getattr(p, name)}: out of its range")


def _steady(name: str, p: Parameters) -> Trace:
    return _trace(name, p, np.full(_steps(p), p.peak), _curve_rng(p))


def _day(name: str, p: Parameters) -> Trace:
    """A day, squeezed into `hours`: a cosine, bent to have the wanted mean, and bursts.

    At the part x of the day the curve is at low + (1 - low) ((1 - cos 2 pi x) / 2) ** bend of its
    peak; the bend is found by bisection.
    """
    rng = _curve_rng(p)
    wave = (1 - np.cos(2 * np.pi * (np.arange(_steps(p)) + 0.5) / _steps(p))) / 2
    above = (p.mean_share - p.low_share) / max(1 - p.low_share, 1e-9)
    curve = p.peak * (p.low_share + (1 - p.low_share) * wave ** _bend(wave, above))
    return _trace(name, p, _with_bursts(curve, p, rng), rng)


def _deepseek(name: str, p: Parameters) -> Trace:
    """DeepSeek's published day: 226.75 nodes on average, 278 at the peak (open-infra-index, day 6).

    Only these two numbers are published. The curve is ours: the plain cosine of that mean and peak,
    without bursts. They are of the nodes that DeepSeek held, so to take them for the load is an
    assumption, too.
    """
    return _day(name, p)


def _bend(wave: Floats, mean_share: float) -> float:
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (wave**middle).mean() > mean_share else (low, middle)
    return (low + high) / 2


def _with_bursts(curve: Floats, p: Parameters, rng: np.random.Generator) -> Floats:
    """Multiplies the curve, for `burst_s` in each of `bursts` equal parts of the day."""
    curve = curve.copy()
    quiet = curve.copy()
    length = max(1, round(p.burst_s / p.step_s))
    for part in np.array_split(np.arange(len(curve)), max(p.bursts, 1))[: p.bursts]:
        starts = part[: max(1, len(part) - length)].tolist()
        if p.within_peak:
            starts = [s for s in starts if quiet[s : s + length].max() * p.burst_factor <= p.peak]
        if len(starts):
            start = int(rng.choice(starts))
            curve[start : start + length] = quiet[start : start + length] * p.burst_factor
    return curve


def popularity_of(p: Parameters) -> tuple[Floats, Floats]:
    """[P, L, E] shares and [P] their times: one keyframe, or one each `drift_s`."""
    rng = np.random.default_rng(p.seed)
    frames = 1 if p.drift_s == 0 else 2 + int(p.hours * 3600 / p.drift_s)
    zipf = 1.0 / np.arange(1, p.experts + 1) ** p.exponent
    zipf /= zipf.sum()
    shuffled = [[rng.permutation(zipf) for _ in range(p.layers)] for _ in range(frames)]
    return np.array(shuffled), np.arange(frames, dtype=np.float64) * max(p.drift_s, 1.0)


def _trace(name: str, p: Parameters, tokens: Floats, rng: np.random.Generator) -> Trace:
    tokens = tokens * np.maximum(0.0, 1 + p.noise * rng.standard_normal(len(tokens)))
    return Trace(name, p.step_s, tokens, p.top_k, *popularity_of(p))


def _curve_rng(p: Parameters) -> np.random.Generator:
    """Apart from the popularity's, so that either can change without the other."""
    return np.random.default_rng([p.seed, 1])


def _steps(p: Parameters) -> int:
    return round(p.hours * 3600 / p.step_s)


GENERATORS: dict[str, Callable[[str, Parameters], Trace]] = {
    "steady": _steady,
    "day": _day,
    "deepseek": _deepseek,
}
DEFAULTS = {
    "steady": Parameters(hours=1.0),
    "deepseek": Parameters(mean_share=226.75 / 278, low_share=2 * 226.75 / 278 - 1, bursts=0),
}
