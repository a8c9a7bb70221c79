"""How even servers are when rows go through the router's own dispatch. Pure.

The planner divides an expert's rows over its copies, but a router divides each batch by itself, and
prefers servers that a row visits anyhow (`expertmesh.dispatch`): that saves messages, and may make
servers less even than planned. So rows are drawn, and dispatched. An expert is chosen by a row at
most once, so with a share p of the assignments it is among a row's top_k with the probability
top_k p <= 1: experts are laid out in a random order, each as long as that, and every whole step
from a random start takes one (systematic sampling).

Shapes: B rows, K top_k, L layers, S servers, E experts.
"""

from __future__ import annotations

import numpy as np

from expertmesh.dispatch import Holders, Ids, plan
from load_controller.planner_pack import Bools
from load_controller.simulator.trace import Floats

#: Pairs for each server, so that chance adds about 3 % at most; and the most servers that takes
#: little time for.
PAIRS = 5_000
MOST_SERVERS = 256
_BATCH = 500


def draw_rows(share: Floats, top_k: int, rows: int, rng: np.random.Generator) -> Ids:
    """[B, K] different experts for each row; `share` [E] of the assignments on average."""
    order = rng.random((rows, len(share))).argsort(1)
    ends = (top_k * share)[order].cumsum(1)
    at = rng.random(rows)[:, None] + np.arange(top_k)
    place = (ends[:, None, :] <= at[:, :, None]).sum(2)
    return np.take_along_axis(order, np.minimum(place, len(share) - 1), 1).astype(np.int32)


def dispatched_maxvio(
    popularity: Floats, top_k: int, holds: Bools, rng: np.random.Generator
) -> float | None:
    """MaxVio of servers, mean over layers, for rows drawn from `popularity` [L, E].

    None where servers are so many that this would take long.
    """
    servers = holds.shape[1]
    if servers > MOST_SERVERS:
        return None
    uneven = []
    for share, held in zip(popularity, holds, strict=True):
        holders, carried = Holders(held, np.ones(servers)), np.zeros(servers)
        for batch in range(-(-PAIRS * servers // (top_k * _BATCH))):
            parts, _ = plan(draw_rows(share, top_k, _BATCH, rng), holders, salt=batch * _BATCH)
            for part in parts:
                carried[part.server] += part.pairs
        uneven.append(carried.max() / carried.mean() - 1)
    return float(np.mean(uneven))
