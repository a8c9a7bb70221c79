"""What a server measures of itself before it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from expert_service.calibration import measure_pairs_per_s
from expert_service.kernels.reference import ReferenceBackend
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot

_WIDTH, _HIDDEN = 6, 8
_DENSE = LayerSpec(index=0, num_experts=0, intermediate_size=0, shared_intermediate_size=_WIDTH)
_MOE = LayerSpec(
    index=1, num_experts=4, intermediate_size=_WIDTH, shared_intermediate_size=_WIDTH,
    gate=GateSpec(score="softmax", top_k=2),
)  # fmt: skip
SPEC = ModelSpec(model_type="test", hidden_size=_HIDDEN, dtype=torch.float32, layers=(_DENSE, _MOE))


class Watched(ReferenceBackend):
    """Counts the batches, and what they ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, tuple[int, ...], set[int]]] = []

    def compute(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        self.asked.append((layer, tuple(ids.shape), set(ids.unique().tolist())))
        return super().compute(layer, hidden, ids, weights)


def _holding(*slots: Slot) -> Watched:
    backend = Watched()
    for slot in slots:
        shapes = ((_WIDTH, _HIDDEN), (_WIDTH, _HIDDEN), (_HIDDEN, _WIDTH))
        backend.load(slot, ExpertWeights(*(torch.randn(*shape) for shape in shapes)))
    return backend


def _ticking(*seconds: float) -> Callable[[], float]:
    """A clock: each try takes the next of these; the first reading is the beginning."""

    def readings() -> Iterator[float]:
        now = 0.0
        yield now
        for each in seconds:
            yield now
            now += each
            yield now

    found = readings()
    return lambda: next(found)


def test_the_best_try_counts() -> None:
    slots = [Slot(1, 0), Slot(1, 1), Slot(1, 3), Slot(1, 4)]
    clock = _ticking(0.02, 0.01, 0.05, 0.02, 0.02, 0.02, 0.02)

    found = measure_pairs_per_s(_holding(*slots), SPEC, slots, torch.float32, clock)

    assert found == pytest.approx(32 * 2 / 0.01)


def test_it_asks_for_routed_experts_that_are_held_and_for_no_other() -> None:
    slots = [Slot(0, 0), Slot(1, 1), Slot(1, 3), Slot(1, 4)]
    backend = _holding(*slots)

    measure_pairs_per_s(backend, SPEC, slots, torch.float32)

    assert {(layer, shape) for layer, shape, _ in backend.asked} == {(1, (32, 2))}
    assert all(ids == {1, 3} for _, _, ids in backend.asked)


def test_a_slow_backend_is_tried_less_often() -> None:
    slots = [Slot(1, 0)]
    backend = _holding(*slots)

    found = measure_pairs_per_s(backend, SPEC, slots, torch.float32, _ticking(0.4, 0.3, 0.2))

    assert len(backend.asked) == 1 + 2
    assert found == pytest.approx(32 / 0.3)


def test_without_a_routed_expert_nothing_is_measured() -> None:
    backend = _holding(Slot(0, 0), Slot(1, 4))

    assert measure_pairs_per_s(backend, SPEC, [Slot(0, 0), Slot(1, 4)], torch.float32) == 0.0
    assert backend.asked == []
