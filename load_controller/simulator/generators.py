"""Traces by name: NAME or NAME:KEY=VALUE,KEY=VALUE. Pure, and the same for the same seed.

`steady`     the same load throughout
`day`        24 hours: a curve with `mean_share` of its peak as mean, and bursts on top of it
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

_DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """What a generator can be given, as in `day:peak=2e6,bursts=0`."""

    seed: int = 1
    hours: float = 24.0
    step_s: float = 10.0
    peak: float = 1e6  # tokens a second at the curve's peak, bursts left out
    mean_share: float = 0.5  # mean of the curve over its peak
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
    return GENERATORS[name](text, _parse(rest, DEFAULTS.get(name, Parameters())))


def _parse(text: str, default: Parameters) -> Parameters:
    kinds = {field.name: type(getattr(default, field.name)) for field in fields(Parameters)}
    given: dict[str, object] = {}
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
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
    if kind is not float and number != int(number):
        raise ConfigError(f"{key} is {text!r}, expected a whole number")
    return kind(number)


def _check(p: Parameters) -> None:
    steps = p.hours * 3600 / p.step_s if p.step_s > 0 else 0
    for name, good in {
        "step_s": p.step_s > 0,
        "hours": 1 <= steps <= 1e6,
        "peak": p.peak > 0,
        "mean_share": 0 < p.mean_share <= 1,
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
    rng = np.random.default_rng(p.seed)
    popularity, keyframes_s = _popularity(p, rng)
    return _trace(name, p, np.full(_steps(p), p.peak), popularity, keyframes_s, rng)


def _day(name: str, p: Parameters) -> Trace:
    """A cosine, bent so that its mean is `mean_share` of its peak, and bursts.

    The share of the peak at the phase x of the day is ((1 - cos 2 pi x) / 2) ** bend; the bend is
    found by bisection.
    """
    rng = np.random.default_rng(p.seed)
    popularity, keyframes_s = _popularity(p, rng)
    wave = (1 - np.cos(2 * np.pi * (np.arange(_steps(p)) + 0.5) * p.step_s / _DAY_S)) / 2
    curve = p.peak * wave ** _bend(wave, p.mean_share)
    return _trace(name, p, _with_bursts(curve, p, rng), popularity, keyframes_s, rng)


def _deepseek(name: str, p: Parameters) -> Trace:
    """DeepSeek's published day: 226.75 nodes on average, 278 at the peak (open-infra-index, day 6).

    Only these two numbers are published. The curve between them is ours: `_day`'s with a mean of
    226.75 / 278 of the peak, and no bursts. The nodes were *theirs to hold*, so taking them for the
    load is an assumption, too.
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
        starts = part[: max(1, len(part) - length)]
        if p.within_peak:
            starts = [s for s in starts if quiet[s : s + length].max() * p.burst_factor <= p.peak]
        if len(starts):
            start = int(rng.choice(starts))
            curve[start : start + length] = quiet[start : start + length] * p.burst_factor
    return curve


def _popularity(p: Parameters, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """[P, L, E] and [P]: one keyframe, or one each `drift_s`."""
    frames = 1 if p.drift_s == 0 else 2 + int(p.hours * 3600 / p.drift_s)
    zipf = 1.0 / np.arange(1, p.experts + 1) ** p.exponent
    zipf /= zipf.sum()
    shuffled = [[rng.permutation(zipf) for _ in range(p.layers)] for _ in range(frames)]
    return np.array(shuffled), np.arange(frames) * max(p.drift_s, 1.0)


def _trace(
    name: str, p: Parameters, tokens: Floats, popularity: Floats, keyframes_s: Floats,
    rng: np.random.Generator,
) -> Trace:  # fmt: skip
    tokens = tokens * np.maximum(0.0, 1 + p.noise * rng.standard_normal(len(tokens)))
    return Trace(name, p.step_s, tokens, p.top_k, popularity, keyframes_s)


def _steps(p: Parameters) -> int:
    return round(p.hours * 3600 / p.step_s)


GENERATORS: dict[str, Callable[[str, Parameters], Trace]] = {
    "steady": _steady,
    "day": _day,
    "deepseek": _deepseek,
}
DEFAULTS = {
    "steady": Parameters(hours=1.0),
    "deepseek": Parameters(mean_share=226.75 / 278, bursts=0),
}
