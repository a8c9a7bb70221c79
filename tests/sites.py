"""Drawn tasks for the planner's parts: servers of unlike speed and room, on one node or several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from load_controller.planner_pack import Bools, Ints, Site


@dataclass(frozen=True)
class Drawn:
    """Loads, servers, and how many slots of a layer each node has."""

    units: Ints  # [L, E]
    site: Site
    slots: Ints  # [nodes]

    @property
    def empty(self) -> Bools:
        """[L, S, E]: nobody holds anything."""
        layers, experts = self.units.shape
        return np.zeros((layers, len(self.site.rate), experts), np.bool_)


def drawn(rng: np.random.Generator, *, weighted: bool = True) -> Drawn:
    """One to three nodes with one to three servers each; every expert has a slot at home."""
    nodes = int(rng.integers(1, 4))
    node = np.repeat(np.arange(nodes), rng.integers(1, 4, nodes))
    run, groups = int(rng.integers(1, 4)), nodes * int(rng.integers(1, 3))
    layers, experts = int(rng.integers(1, 4)), groups * run
    homes = [rng.permutation(np.arange(groups) % nodes) for _ in range(layers)]
    at_home = experts // nodes
    servers_of = np.bincount(node)
    least = -(-at_home // servers_of[node])
    capacity = rng.integers(least, np.maximum(least, at_home) + 2)
    room = np.bincount(node, np.minimum(capacity, at_home)).astype(np.int64)
    return Drawn(
        rng.integers(0, 30, (layers, experts)) * int(rng.choice([1, 1000])),
        Site(
            rate=rng.choice([1.0, 1.0, 2.5, 10.0], len(node)),
            capacity=capacity,
            node=node,
            home=np.repeat(np.array(homes), run, axis=1),
            run=run,
            weighted=weighted,
        ),
        rng.integers(at_home, room + 1),
    )
