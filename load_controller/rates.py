"""Relative speeds of servers, from what each has measured at its start. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log

#: Measurements within this factor are taken for noise, of neighbours on a host, clocks and caches:
#: weights that follow it would unbalance servers that are alike.
ALIKE = 1.5


def relative_rates(pairs_per_s: Mapping[str, float]) -> dict[str, float]:
    """1 for the fastest server and all that may be as fast; for the others what their kind reaches
    of that.

    Servers are of one kind when they are within a factor of ALIKE of its fastest; a kind's speed is
    the geometric mean of its servers', to two digits: each change is a new placement. Empty, so
    that all count as equal, where some server has measured nothing: nobody knows how it compares.
    """
    if not pairs_per_s or min(pairs_per_s.values()) <= 0:
        return {}
    kinds: list[list[str]] = []
    for name in sorted(pairs_per_s, key=lambda each: (-pairs_per_s[each], each)):
        if kinds and pairs_per_s[name] * ALIKE >= pairs_per_s[kinds[-1][0]]:
            kinds[-1].append(name)
        else:
            kinds.append([name])
    speeds = [exp(sum(log(pairs_per_s[name]) for name in kind) / len(kind)) for kind in kinds]
    rates = [float(f"{speed / speeds[0]:.2g}") for speed in speeds]
    return {name: rate for kind, rate in zip(kinds, rates, strict=True) for name in kind}
