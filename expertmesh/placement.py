"""Which server holds which slots: pure data and pure decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from expertmesh.errors import ConfigError
from expertmesh.model import ModelSpec, Slot

#: Shared experts and dense layers go on every server while that makes a server at most this much
#: larger: then a token's shared expert costs no extra message, and a dense layer's rows spread.
SHARED_EVERYWHERE_SHARE = 0.25


@dataclass(frozen=True)
class SlotMap:
    """One version of the placement. Never changed, only replaced."""

    epoch: int
    servers: tuple[str, ...]
    #: By layer index: [S, num_experts + has_shared] bool, which server holds which expert.
    holds: Mapping[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    #: Relative speed by server; 1 for those not here.
    rates: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        epoch: int,
        spec: ModelSpec,
        slots: Mapping[str, Sequence[Slot]],
        rates: Mapping[str, float] | None = None,
    ) -> SlotMap:
        """The map in which each server holds the given slots; unknown ones are left out."""
        servers = tuple(sorted(slots))
        holds = {
            layer.index: np.zeros((len(servers), layer.num_experts + layer.has_shared), np.bool_)
            for layer in spec.layers
        }
        for row, server in enumerate(servers):
            for layer_index, expert in slots[server]:
                table = holds.get(layer_index)
                if table is not None and 0 <= expert < table.shape[1]:
                    table[row, expert] = True
        return cls(epoch, servers, holds, dict(rates or {}))

    def missing(self) -> list[Slot]:
        """Experts that no server holds."""
        return [
            Slot(layer, int(expert))
            for layer, table in self.holds.items()
            for expert in np.flatnonzero(~table.any(0))
        ]


def initial_parts(spec: ModelSpec, shards: int) -> list[list[Slot]]:
    """Divides a model's slots over `shards` parts of about equal size.

    Routed experts are cut in contiguous runs, so that the experts of a group, which the group
    limit chooses together, share a server; where they do not divide evenly, the parts that get one
    more rotate from layer to layer. Shared experts and dense layers go to every part if that is
    cheap (SHARED_EVERYWHERE_SHARE), else to one part each, in turn.
    """
    if shards < 1:
        raise ConfigError(f"shards is {shards}, expected at least 1")
    parts: list[list[Slot]] = [[] for _ in range(shards)]
    everywhere = _shared_is_cheap(spec, shards)
    for position, layer in enumerate(spec.layers):
        bounds = [layer.num_experts * part // shards for part in range(shards + 1)]
        for part, (first, stop) in enumerate(pairwise(bounds)):
            target = parts[(part + position) % shards if layer.num_experts % shards else part]
            target += [Slot(layer.index, e) for e in range(first, stop)]
        if layer.has_shared:
            chosen = parts if everywhere else [parts[position % shards]]
            for target in chosen:
                target.append(Slot(layer.index, layer.shared_id))
    if any(not part for part in parts):
        raise ConfigError(
            f"{shards} shards is more than this model has experts to hold: use fewer shards"
        )
    return parts


def _shared_is_cheap(spec: ModelSpec, shards: int) -> bool:
    """Whether a copy on every part makes a part at most SHARED_EVERYWHERE_SHARE larger."""
    shared = sum(layer.shared_intermediate_size for layer in spec.layers)
    routed = sum(layer.num_experts * layer.intermediate_size for layer in spec.layers)
    part = (routed + shared) / shards
    return shared - shared / shards <= SHARED_EVERYWHERE_SHARE * part


def group_by_layer(slots: Sequence[Slot]) -> dict[int, list[int]]:
    """The expert ids of each layer, both ascending: the form in which slots travel."""
    grouped: dict[int, list[int]] = {}
    for layer, expert in sorted(slots):
        grouped.setdefault(layer, []).append(expert)
    return grouped
