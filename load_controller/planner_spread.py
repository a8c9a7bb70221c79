"""How an expert's rows are divided over its copies, once they are placed. Pure; numpy only.

Even shares waste what copies make possible: a copy on a slow or busy server should get less. Each
expert in turn pours its load over its servers as water into connected vessels: server s rises to
the level t, in time = load / rate, so that sum_s max(0, t * rate_s - other_s) is the expert's
load. No pouring raises the largest time, and repeated they tend to the least largest time that
the placement allows (they descend sum_s load_s^2 / rate_s, whose least point is that one).

Shapes: L layers, S servers, E experts, M the most copies of an expert.
"""

from __future__ import annotations

import numpy as np

from load_controller.planner_pack import Bools, Floats, Ints, Site

#: Times that every expert pours; a fixed number, so that equal layers get equal answers.
SWEEPS = 4


def spread(units: Ints, holds: Bools, site: Site) -> Floats:
    """[L, S, E]: what each copy is to carry, in `units`; sums over S to an expert's load.

    An expert that no server holds carries nothing. Evenly where the site is not weighted.
    """
    copies = holds.sum(1)
    amount = np.where(holds, (units / np.maximum(copies, 1))[:, None, :], 0.0)
    if not site.weighted:
        return amount
    load = amount.sum(2)
    several = np.argsort(np.where(copies > 1, -units, 1), axis=1, kind="stable")
    several = several[:, : int((copies > 1).sum(1).max())]  # [L, k], heaviest first
    # A layer with fewer such experts pours some with one copy or none, which changes nothing.
    holders = [_holders(holds, expert) for expert in several.T]
    every = np.arange(len(units))
    for _ in range(SWEEPS):
        for expert, (at, real) in zip(several.T, holders, strict=True):
            mine = amount[every[:, None], at, expert[:, None]]
            other = load[every[:, None], at] - mine
            poured = _pour(units[every, expert], other, site.rate[at], real)
            amount[every[:, None], at, expert[:, None]] = poured
            load[every[:, None], at] = other + poured
    return amount


def _holders(holds: Bools, expert: Ints) -> tuple[Ints, Bools]:
    """[L, M] the servers that hold each layer's expert, then others; and which are real."""
    held = holds[np.arange(len(holds)), :, expert]  # [L, S]
    most = max(1, int(held.sum(1).max()))
    at = np.argsort(~held, axis=1, kind="stable")[:, :most]
    return at, np.take_along_axis(held, at, 1)


def _pour(total: Ints, other: Floats, rate: Floats, real: Bools) -> Floats:
    """[L, M]: `total` divided over the real columns, to one level above `other`."""
    time = np.where(real, other / rate, np.inf)
    row = np.arange(len(time))[:, None]
    order = time.argsort(axis=1, kind="stable")
    time, other, rate = time[row, order], other[row, order], rate[row, order]
    real = real[row, order]
    level = (total[:, None] + np.where(real, other, 0.0).cumsum(1)) / rate.cumsum(1)
    wet = (real & (level > time)).sum(1)  # vessels that the level reaches: a prefix
    top = level[row, np.maximum(wet - 1, 0)[:, None]]
    reached = real & (np.arange(time.shape[1]) < wet[:, None])
    poured = np.empty_like(other)
    poured[row, order] = np.where(reached, top * rate - other, 0.0)
    return poured
