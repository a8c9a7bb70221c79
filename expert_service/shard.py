"""The experts that one server holds: loads them, checks what is asked, counts what is computed.

R rows, K pairs asked per row, H hidden size, E experts of a layer, the shared one included.
Nothing here knows gRPC, Ray or asyncio. Not thread-safe: one thread owns a shard.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expert_service.backend import Backend
from expertmesh.checkpoint import slot_digest
from expertmesh.checkpoint.fp8 import KERNEL_BLOCK
from expertmesh.dispatch import Ids
from expertmesh.errors import (
    ConfigError,
    InvalidRequestError,
    SlotNotHeldError,
    UnknownLayerError,
)
from expertmesh.model import ExpertWeights, Fp8ExpertWeights, LayerSpec, ModelSpec, Slot

#: Memory is given back to the system after this many bytes of weights were loaded.
_TRIM_EVERY_BYTES = 32 * 2**20
RowWeights = npt.NDArray[np.float32]
_NAMED = 8  # experts that an error names: enough to look for, few enough for a header
Weights = ExpertWeights | Fp8ExpertWeights
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Up to so many pairs Python's own loop counts, or checks, sooner than numpy's calls.
_FEW_PAIRS, _FEW_CHECKED = 16, 64


class ExpertShard:
    """A server's slots, on one backend."""

    def __init__(self, spec: ModelSpec, slots: Sequence[Slot], backend: Backend) -> None:
        """Raises ConfigError for a slot that the model does not have, or that is named twice."""
        self._spec = spec
        self._backend = backend
        self._layers = {layer.index: _LayerState(layer) for layer in spec.layers}
        self._digests: dict[Slot, str] = {}
        self.drops = 0  # grows when a slot goes: what was checked before must be checked again
        self.plan(slots)

    def plan(self, slots: Sequence[Slot]) -> None:
        """Says what `load` shall load. Raises as the constructor does."""
        for slot in slots:
            self.check_slot(slot)
        if len(set(slots)) != len(slots):
            raise ConfigError(f"a slot is named twice among {len(slots)}")
        self._planned = tuple(slots)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots held now, in the order in which they came."""
        return tuple(self._digests)

    @property
    def slot_digests(self) -> dict[Slot, str]:
        """Hex sha256 of each held slot's weights, as they were loaded."""
        return dict(self._digests)

    def load(self, read_expert: Callable[[Slot], Weights], on_slot: Callable[[Slot], None]) -> None:
        """Loads the planned slots one after the other and warms the backend up.

        `on_slot` is called after each. At most one expert's weights are alive beside the
        backend's. Raises what `read_expert` raises, and ConfigError for weights of a wrong shape.
        """
        untrimmed_bytes = 0
        for slot in self._planned:
            untrimmed_bytes += self._read_and_add(slot, read_expert)
            if untrimmed_bytes > _TRIM_EVERY_BYTES:
                untrimmed_bytes = 0
                return_free_memory()
            on_slot(slot)
        return_free_memory()
        self._backend.finish_loading()

    def _read_and_add(self, slot: Slot, read_expert: Callable[[Slot], Weights]) -> int:
        """Adds one slot and returns its bytes; its weights are gone when this returns."""
        weights = read_expert(slot)
        self.add(slot, weights)
        return sum(matrix.nbytes for matrix in weights)

    def add(self, slot: Slot, weights: Weights) -> None:
        """Takes one more slot; its count starts, or goes on, where it was.

        Raises ConfigError for a slot that is held already or that the model does not have, and for
        weights of a wrong shape.
        """
        self._check_weights(slot, weights)
        # Once, for the digest and the backend both.
        weights = type(weights)(*(matrix.detach().contiguous() for matrix in weights))
        self.add_prepared(slot, weights, slot_digest(weights))

    def prepare(self, slot: Slot, weights: Weights, pause: Callable[[], None]) -> object:
        """What `add_prepared` takes; from any thread, also while another one computes.

        `pause` is called between pieces of the work. Raises ConfigError as `add` does.
        """
        self._check_weights(slot, weights)
        return self._backend.prepare(weights, pause)

    def add_prepared(self, slot: Slot, prepared: object, digest: str) -> None:
        """`add` for weights that are prepared and hashed already: next to no work."""
        self.check_slot(slot)
        if slot in self._digests:
            raise ConfigError(f"{slot} is held already")
        self._backend.load(slot, prepared)
        self._digests[slot] = digest
        self._layers[slot.layer].set_held(slot.expert, True)

    def drop(self, slot: Slot) -> object:
        """Forgets one slot, but not its count. Raises SlotNotHeldError when it is not held.

        Returns what the backend held of it: its memory is free once the caller lets go of that.
        """
        if slot not in self._digests:
            raise SlotNotHeldError(f"{slot} is not held", field="slot")
        self.drops += 1
        self._layers[slot.layer].set_held(slot.expert, False)
        del self._digests[slot]
        return self._backend.drop(slot)

    @property
    def any_thread(self) -> bool:
        """See Backend."""
        return self._backend.any_thread

    def held(self, layer: int) -> torch.Tensor:
        """Which experts of a layer are here: bool [E]. Raises UnknownLayerError."""
        return torch.from_numpy(self._layer(layer).held_E[:-1].copy())

    def execution_counts(self) -> dict[int, torch.Tensor]:
        """(row, expert) pairs computed since the start: int64 [E] by layer, layers held only."""
        return {
            index: torch.from_numpy(state.counts_E[:-1].copy())
            for index, state in self._layers.items()
            if state.held_E[:-1].any() or state.counts_E[:-1].any()
        }

    def execute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: Ids,
        weights_RK: RowWeights,
    ) -> torch.Tensor:
        """The weighted sum of the asked experts for each row, [R, H] in `hidden_RH`'s dtype.

        `expert_ids_RK` is int32 with -1 where nothing is asked, `weights_RK` float32. Raises
        UnknownLayerError, SlotNotHeldError naming the experts, and InvalidRequestError for wrong
        shapes, dtypes or an expert asked twice for a row. Values that are not finite stay in their
        rows: a router has refused them already, unless the caller wants them passed.
        """
        self.check(layer, hidden_RH, expert_ids_RK, weights_RK)
        return self.compute(layer, hidden_RH, expert_ids_RK, weights_RK)

    def check(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: Ids,
        weights_RK: RowWeights,
    ) -> None:
        """Raises what `execute` raises for requests that cannot be computed."""
        state = self._layer(layer)
        self._check_tensors(hidden_RH, expert_ids_RK, weights_RK)
        state.check_ids(expert_ids_RK)

    def compute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: Ids,
        weights_RK: RowWeights,
    ) -> torch.Tensor:
        """`execute` for rows that have been checked: one request's, or several merged ones'."""
        pairs = torch.from_numpy(expert_ids_RK), torch.from_numpy(weights_RK)
        out_RH = self._backend.compute(layer, hidden_RH, *pairs)
        self._layers[layer].count(expert_ids_RK)
        return out_RH

    def _layer(self, layer: int) -> _LayerState:
        state = self._layers.get(layer)
        if state is None:
            raise UnknownLayerError(f"layer {layer} is not a layer of this model", field="layer")
        return state

    def check_slot(self, slot: Slot) -> None:
        """Raises ConfigError for a slot that the model does not have."""
        state = self._layers.get(slot.layer)
        if state is None or not 0 <= slot.expert < len(state.held_E) - 1:
            raise ConfigError(f"{slot} is not an expert of this {self._spec.model_type} model")

    def _check_weights(self, slot: Slot, weights: Weights) -> None:
        self.check_slot(slot)
        hidden, width = self._spec.hidden_size, self._layers[slot.layer].spec.width(slot.expert)
        expected = [(width, hidden), (width, hidden), (hidden, width)]
        if isinstance(weights, Fp8ExpertWeights):
            expected += [KERNEL_BLOCK.grid(shape) for shape in expected]
        for name, matrix, shape in zip(weights._fields, weights, expected, strict=True):
            if tuple(matrix.shape) != shape:
                raise ConfigError(f"{slot}: {name} is {list(matrix.shape)}, not {list(shape)}")

    def _check_tensors(
        self, hidden_RH: torch.Tensor, expert_ids_RK: Ids, weights_RK: RowWeights
    ) -> None:
        shape, pairs = hidden_RH.shape, expert_ids_RK.shape
        if (
            len(shape) == len(pairs) == 2
            and shape[1] == self._spec.hidden_size
            and pairs[0] == shape[0]
            and pairs == weights_RK.shape
            and hidden_RH.dtype in _DTYPES
            and expert_ids_RK.dtype == np.int32
            and weights_RK.dtype == np.float32
        ):
            return
        # Below, what is wrong.
        if hidden_RH.ndim != 2 or hidden_RH.shape[1] != self._spec.hidden_size:
            raise InvalidRequestError(
                f"hidden is {list(hidden_RH.shape)}, not [rows, {self._spec.hidden_size}]",
                field="hidden",
            )
        if hidden_RH.dtype not in _DTYPES:
            raise InvalidRequestError(
                f"hidden is {hidden_RH.dtype}, not float32, float16 or bfloat16", field="hidden"
            )
        _check_pairs("expert_ids", expert_ids_RK, np.int32, len(hidden_RH))
        _check_pairs("weights", weights_RK, np.float32, len(hidden_RH))
        if expert_ids_RK.shape != weights_RK.shape:
            raise InvalidRequestError(
                f"weights are {list(weights_RK.shape)}, but expert_ids {list(expert_ids_RK.shape)}",
                field="weights",
            )


class _LayerState:
    """One layer's held experts and counts. Both have one more entry at the end, for id -1.

    In numpy: its calls cost a quarter of torch's, which shows on a request of one row.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        experts = spec.num_experts + spec.has_shared
        self.held_E = np.zeros(experts + 1, dtype=np.bool_)
        self.held_E[-1] = True
        self.held: set[int] = set()  # the same as a set
        self.counts_E = np.zeros(experts + 1, dtype=np.int64)

    def check_ids(self, ids_RK: Ids) -> None:
        """Raises SlotNotHeldError, or InvalidRequestError for ids twice in a row or below -1."""
        if not ids_RK.size:
            return
        if ids_RK.size <= _FEW_CHECKED and all(map(self._allows, ids_RK.tolist())):
            return
        # Sorted rows serve every check: extremes are at the ends, doubles side by side. Numpy's own
        # reductions, as its methods are Python around them.
        sorted_RK = ids_RK.copy()
        sorted_RK.sort(1)
        if np.minimum.reduce(sorted_RK[:, 0]) < -1:
            raise InvalidRequestError(
                f"expert_ids hold {sorted_RK.min()}; ids are -1 or above", field="expert_ids"
            )
        most = np.maximum.reduce(sorted_RK[:, -1])
        if most >= len(self.held_E) - 1 or not np.logical_and.reduce(self.held_E[sorted_RK], None):
            self._refuse_not_held(sorted_RK)
        doubled_RK = (sorted_RK[:, 1:] == sorted_RK[:, :-1]) & (sorted_RK[:, 1:] >= 0)
        if np.logical_or.reduce(doubled_RK, None):
            row, column = np.argwhere(doubled_RK)[0]
            raise InvalidRequestError(
                f"row {row} asks expert {sorted_RK[row, column]} twice", field="expert_ids"
            )

    def _allows(self, ids: list[int]) -> bool:
        """Whether one row's ids are right."""
        asked = [expert for expert in ids if expert != -1]
        return self.held.issuperset(asked) and len(set(asked)) == len(asked)

    def set_held(self, expert: int, held: bool) -> None:
        """Notes that an expert has come or gone."""
        self.held_E[expert] = held
        (self.held.add if held else self.held.discard)(expert)

    def count(self, ids_RK: Ids) -> None:
        """Counts each asked pair once; those with id -1 go to the entry at the end."""
        if ids_RK.size <= _FEW_PAIRS:
            for expert in ids_RK.ravel().tolist():
                self.counts_E[expert] += 1
            return
        experts = len(self.counts_E)
        self.counts_E += np.bincount(ids_RK.ravel() % experts, minlength=experts)

    def _refuse_not_held(self, ids_RK: Ids) -> None:
        held = {-1, *np.flatnonzero(self.held_E[:-1]).tolist()}
        missing = [str(expert) for expert in np.unique(ids_RK).tolist() if expert not in held]
        named = ", ".join(missing[:_NAMED]) + (" ..." if len(missing) > _NAMED else "")
        raise SlotNotHeldError(
            f"layer {self.spec.index}: experts {named} are not held here",
            field="expert_ids",
        )


def return_free_memory() -> None:
    """From any thread: gives the holes that unpacked weights left in the heap back to the system.

    Packed copies of all sizes land between them, and glibc on its own returns only the heap's
    end: without this a shard of large experts peaks at 1.4 times its weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _check_pairs(name: str, array: npt.NDArray[Any], dtype: type[np.generic], rows: int) -> None:
    if array.dtype != dtype:
        wanted = np.dtype(dtype)
        raise InvalidRequestError(f"{name} are {array.dtype}, not {wanted}", field=name)
    if array.ndim != 2 or len(array) != rows:
        raise InvalidRequestError(
            f"{name} are {list(array.shape)}, not [{rows}, k] like the rows of hidden", field=name
        )
