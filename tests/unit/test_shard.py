"""One server's shard: loading, checks, counts, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from expert_service.kernels.reference import ReferenceBackend
from expert_service.shard import ExpertShard, RowWeights
from expertmesh.checkpoint import slot_digest
from expertmesh.dispatch import Ids
from expertmesh.errors import (
    ConfigError,
    InvalidRequestError,
    SlotNotHeldError,
    UnknownLayerError,
)
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot

H = 8
SPEC = ModelSpec(
    model_type="test",
    hidden_size=H,
    dtype=torch.float32,
    layers=(
        LayerSpec(index=0, num_experts=0, intermediate_size=0, shared_intermediate_size=6),
        LayerSpec(
            index=1,
            num_experts=4,
            intermediate_size=3,
            shared_intermediate_size=5,
            gate=GateSpec(score="softmax", top_k=2),
        ),
    ),
)
SLOTS = [Slot(0, 0), Slot(1, 0), Slot(1, 2), Slot(1, 4)]


def _weights(slot: Slot) -> ExpertWeights:
    generator = torch.Generator().manual_seed(hash(slot))
    width = SPEC.layers[slot.layer].width(slot.expert)
    return ExpertWeights(
        torch.randn(width, H, generator=generator),
        torch.randn(width, H, generator=generator),
        torch.randn(H, width, generator=generator),
    )


@pytest.fixture
def shard() -> ExpertShard:
    shard = ExpertShard(SPEC, SLOTS, ReferenceBackend())
    shard.load(_weights, lambda slot: None)
    return shard


def _ids(*rows: list[int]) -> Ids:
    return np.array(rows, np.int32)


def _weights_of(*rows: list[float]) -> RowWeights:
    return np.array(rows, np.float32)


def _ones(*shape: int) -> RowWeights:
    return np.ones(shape, np.float32)


def _alone(
    backend: ReferenceBackend, row: torch.Tensor, expert: int, weight: float
) -> torch.Tensor:
    """What one expert of layer 1 adds to a row."""
    ids = torch.tensor([[expert]], dtype=torch.int32)
    return backend.compute(1, row, ids, torch.tensor([[weight]]))


def test_load_reports_each_slot_and_keeps_its_digest() -> None:
    shard = ExpertShard(SPEC, SLOTS, ReferenceBackend())
    loaded: list[Slot] = []

    shard.load(_weights, loaded.append)

    assert loaded == SLOTS
    assert shard.slots == tuple(SLOTS)
    assert shard.slot_digests == {slot: slot_digest(_weights(slot)) for slot in SLOTS}
    assert shard.held(0).tolist() == [True]
    assert shard.held(1).tolist() == [True, False, True, False, True]


def test_execute_adds_up_the_asked_experts(shard: ExpertShard) -> None:
    hidden = torch.randn(2, H)

    out = shard.execute(1, hidden, _ids([0, 2], [4, -1]), _weights_of([0.5, 0.25], [1.0, 9.0]))

    truth = ReferenceBackend()
    for slot in SLOTS:
        truth.load(slot, _weights(slot))
    expected_0 = _alone(truth, hidden[:1], 0, 0.5) + _alone(truth, hidden[:1], 2, 0.25)
    expected_1 = _alone(truth, hidden[1:], 4, 1.0)
    torch.testing.assert_close(out, torch.cat([expected_0, expected_1]))


def test_executions_are_counted_per_slot_and_holes_are_not(shard: ExpertShard) -> None:
    ids = _ids([0, 2], [4, -1], [2, 0], [-1, -1])
    for _ in range(2):
        shard.execute(1, torch.randn(4, H), ids, _ones(4, 2))
    shard.execute(0, torch.randn(3, H), _ids([0], [0], [0]), _ones(3, 1))

    counts = shard.execution_counts()

    assert counts[0].tolist() == [3]
    assert counts[1].tolist() == [4, 0, 4, 0, 2]
    assert counts[1].dtype == torch.int64


def test_a_refused_request_is_not_counted(shard: ExpertShard) -> None:
    with pytest.raises(SlotNotHeldError):
        shard.execute(1, torch.randn(1, H), _ids([0, 1]), _ones(1, 2))

    assert shard.execution_counts()[1].sum() == 0


def test_no_rows_give_no_rows(shard: ExpertShard) -> None:
    out = shard.execute(1, torch.empty(0, H), np.empty((0, 2), np.int32), _ones(0, 2))  # fmt: skip

    assert out.shape == (0, H)


def test_every_missing_expert_is_named(shard: ExpertShard) -> None:
    with pytest.raises(SlotNotHeldError, match="layer 1: experts 1, 3, 17 are not held"):
        shard.execute(1, torch.randn(2, H), _ids([3, 17], [1, 0]), _ones(2, 2))


def test_an_unknown_layer_is_refused(shard: ExpertShard) -> None:
    with pytest.raises(UnknownLayerError, match="layer 2 "):
        shard.execute(2, torch.randn(1, H), _ids([0]), _ones(1, 1))
    with pytest.raises(UnknownLayerError):
        shard.held(2)


@pytest.mark.parametrize(
    ("hidden", "ids", "weights", "field", "message"),
    [
        (torch.zeros(2, 9), _ids([0], [0]), _ones(2, 1), "hidden", r"\[2, 9\]"),
        (torch.zeros(H), _ids([0]), _ones(1, 1), "hidden", r"\[8\]"),
        (torch.zeros(1, H).double(), _ids([0]), _ones(1, 1), "hidden", "float64"),
        (torch.zeros(2, H), _ids([0]), _ones(2, 1), "expert_ids", r"\[1, 1\]"),
        (torch.zeros(1, H), _ids([0]).astype(np.int64), _ones(1, 1), "expert_ids", "int64"),
        (torch.zeros(1, H), _ids([-2]), _ones(1, 1), "expert_ids", "-2"),
        (torch.zeros(2, H), _ids([0, 2], [2, 2]), _ones(2, 2), "expert_ids", "row 1 asks "
         "expert 2 twice"),
        (torch.zeros(1, H), _ids([0, 2]), _ones(1, 1), "weights", r"\[1, 1\]"),
        (torch.zeros(1, H), _ids([0]), _ones(1, 1).astype(np.float16), "weights", "float16"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_its_field(
    shard: ExpertShard,
    hidden: torch.Tensor,
    ids: Ids,
    weights: RowWeights,
    field: str,
    message: str,
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        shard.execute(1, hidden, ids, weights)

    assert caught.value.field == field


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_stays_in_its_row(shard: ExpertShard, bad: float) -> None:
    hidden, ids = torch.randn(2, H), _ids([0, 2], [0, 2])
    good = _weights_of([0.5, 0.5], [0.5, 0.5])
    mixed = _weights_of([0.5, bad], [0.5, 0.5])

    expected = shard.execute(1, hidden, ids, good)
    actual = shard.execute(1, hidden, ids, mixed)

    assert not actual[0].isfinite().any()
    torch.testing.assert_close(actual[1], expected[1])


def test_a_slot_that_moves_away_is_refused_and_one_that_comes_is_served(
    shard: ExpertShard,
) -> None:
    ask = (1, torch.randn(1, H), _ids([3]), _ones(1, 1))

    shard.add(Slot(1, 3), _weights(Slot(1, 3)))
    shard.execute(*ask)
    shard.drop(Slot(1, 3))

    with pytest.raises(SlotNotHeldError):
        shard.execute(*ask)
    with pytest.raises(SlotNotHeldError):
        shard.drop(Slot(1, 3))
    assert Slot(1, 3) not in shard.slot_digests
    assert shard.execution_counts()[1].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("slots", [[Slot(1, 5)], [Slot(7, 0)], [Slot(1, 0), Slot(1, 0)]])
def test_a_shard_with_slots_that_cannot_be_is_refused(slots: list[Slot]) -> None:
    with pytest.raises(ConfigError):
        ExpertShard(SPEC, slots, ReferenceBackend())


def test_weights_of_another_shape_are_refused(shard: ExpertShard) -> None:
    with pytest.raises(ConfigError, match=r"gate is \[5, 8\], not \[3, 8\]"):
        shard.add(Slot(1, 1), _weights(Slot(1, 4)))
    with pytest.raises(ConfigError, match="held already"):
        shard.add(Slot(1, 0), _weights(Slot(1, 0)))


_LOAD_A_SHARD = """
    import json, sys, torch
    from expert_service.kernels import create_backend
    from expert_service.kernels.cpu.onednn_cpu import compute_dtype
    from expert_service.shard import ExpertShard
    from expertmesh.model import ExpertWeights, LayerSpec, ModelSpec, Slot

    experts, hidden, width = map(int, sys.argv[1:])
    layer = LayerSpec(index=0, num_experts=experts, intermediate_size=width,
                      shared_intermediate_size=0)
    spec = ModelSpec(model_type="test", hidden_size=hidden, dtype=torch.bfloat16, layers=(layer,))

    def read(slot):
        ones = torch.ones(width, hidden, dtype=torch.bfloat16)
        return ExpertWeights(ones, ones.clone(), ones.t().clone())

    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def load(slots):
        backend = create_backend("onednn", "cpu", torch.bfloat16, spec, 1)
        shard = ExpertShard(spec, slots, backend)
        shard.load(read, lambda slot: None)
        return shard

    load([Slot(0, 0)])  # imports, primitives
    before = status("RssAnon:")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    base = status("VmHWM:")
    shard = load(list(layer.slots()))
    # float32 where the CPU has no instructions for bfloat16: the shard is twice as large there.
    packed = experts * 3 * hidden * width * compute_dtype(torch.bfloat16).itemsize
    print(json.dumps({"peak": (status("VmHWM:") - base) / packed,
                      "held": (status("RssAnon:") - before) / packed}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("experts", "hidden", "width"),
    [(12, 2048, 1408), (2000, 128, 128)],
    ids=["large experts", "many small experts"],
)
@pytest.mark.slow
def test_loading_peaks_at_1_3_times_the_shard(experts: int, hidden: int, width: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_LOAD_A_SHARD)]

    run = subprocess.run(
        [*command, str(experts), str(hidden), str(width)], capture_output=True, check=True
    )

    use = json.loads(run.stdout)
    assert use["peak"] <= 1.3
    assert use["held"] <= 1.3
