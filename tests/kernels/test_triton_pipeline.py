"""The order of copies and kernels on the lanes of a device, without one.

A lane's work is numbered, and each piece of work knows which numbers of the other lanes it comes
after: what a CUDA stream that waits for events guarantees, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch

from expert_service.kernels.triton.backend.batch import Batch, batch_bytes, batch_views, fill
from expert_service.kernels.triton.backend.device import InterpreterDevice, Lane
from expert_service.kernels.triton.backend.pipeline import Pipeline

HIDDEN = 8
Clock = dict[Lane, int]


@dataclass
class Work:
    """One piece of work, and the last of each lane that it comes after."""

    lane: Lane
    number: int
    after: Clock

    def comes_after(self, other: Work) -> bool:
        """Whether the device guarantees it."""
        return self.after[other.lane] >= other.number


@dataclass
class TracedMark:
    """What had been started on a lane, and what that comes after."""

    device: TracedDevice
    clock: Clock

    def wait(self) -> None:
        now = self.device.clocks[self.device.lane]
        for lane, number in self.clock.items():
            now[lane] = max(now[lane], number)

    def synchronize(self) -> None:
        self.device.host_waits.append(self.clock)


@dataclass
class TracedDevice(InterpreterDevice):
    """Notes what its lanes guarantee."""

    clocks: dict[Lane, Clock] = field(
        default_factory=lambda: {lane: dict.fromkeys(Lane, 0) for lane in Lane}
    )
    lane: Lane = Lane.COMPUTE
    done: list[Work] = field(default_factory=list)
    host_waits: list[Clock] = field(default_factory=list)

    def on(self, lane: Lane) -> AbstractContextManager[None]:
        return self._on(lane)

    @contextmanager
    def _on(self, lane: Lane) -> Iterator[None]:
        before, self.lane = self.lane, lane
        self.clocks[lane][lane] += 1
        yield
        self.done.append(Work(lane, self.clocks[lane][lane], dict(self.clocks[lane])))
        self.lane = before

    def mark(self) -> TracedMark:
        return TracedMark(self, dict(self.clocks[self.lane]))

    def pieces(self) -> list[tuple[Work, Work, Work]]:
        """Copy in, compute, copy out of each piece."""
        at = [i for i, work in enumerate(self.done) if work.lane is Lane.COPY_IN]
        return [tuple(self.done[i : i + 3]) for i in at]  # type: ignore[misc]


def _double(batch: Batch, out_RH: torch.Tensor) -> None:
    out_RH.copy_(batch.hidden_RH * 2)


def _inputs(rows: int, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.arange(rows * HIDDEN, dtype=torch.float32).view(rows, HIDDEN)
    return hidden, torch.zeros(rows, k, dtype=torch.int32), torch.ones(rows, k)


@pytest.fixture
def device() -> TracedDevice:
    return TracedDevice()


@pytest.fixture
def pipeline(device: TracedDevice) -> Pipeline:
    return Pipeline(device, HIDDEN, torch.float32, usual_k=2)


def test_each_piece_is_copied_in_then_computed_then_copied_out(
    device: TracedDevice, pipeline: Pipeline
) -> None:
    inputs = _inputs(57)

    out = pipeline.run(_double, 2, 10, inputs)

    assert torch.equal(out, inputs[0] * 2)
    assert len(device.pieces()) == 6
    for copy_in, compute, copy_out in device.pieces():
        assert [work.lane for work in (copy_in, compute, copy_out)] == list(Lane)
        assert compute.comes_after(copy_in)
        assert copy_out.comes_after(compute)


def test_a_piece_is_copied_in_while_the_one_before_is_computed(
    device: TracedDevice, pipeline: Pipeline
) -> None:
    pipeline.run(_double, 2, 10, _inputs(57))

    pieces = device.pieces()
    for (_, compute, _), (next_in, _, _) in pairwise(pieces):
        assert not next_in.comes_after(compute)


def test_buffers_are_used_again_only_after_their_last_use(
    device: TracedDevice, pipeline: Pipeline
) -> None:
    pipeline.run(_double, 2, 10, _inputs(57))
    pipeline.run(_double, 2, 10, _inputs(12))

    pieces = device.pieces()
    assert len(pieces) == 8
    for (_, compute, copy_out), (later_in, later_compute, _) in zip(
        pieces, pieces[2:], strict=False
    ):
        assert later_in.comes_after(compute)
        assert later_compute.comes_after(copy_out)


def test_the_host_waits_once_for_the_last_copy_out(
    device: TracedDevice, pipeline: Pipeline
) -> None:
    pipeline.run(_double, 2, 10, _inputs(57))

    last_out = device.pieces()[-1][2]
    assert len(device.host_waits) == 1
    assert device.host_waits[0][Lane.COPY_OUT] == last_out.number


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_recorded_batch_goes_the_same_way(
    rows: int, device: TracedDevice, pipeline: Pipeline
) -> None:
    pipeline.claim_bucket()
    recorded = pipeline.record(_double, 4, 2)
    inputs = _inputs(rows, 1)

    outputs = [pipeline.replay(recorded, 4, 2, inputs) for _ in range(3)]

    assert all(torch.equal(out, inputs[0] * 2) for out in outputs)
    assert len({out.data_ptr() for out in outputs}) == 3
    for copy_in, compute, copy_out in device.pieces():
        assert compute.comes_after(copy_in)
        assert copy_out.comes_after(compute)
    assert len(device.host_waits) == 3


def test_a_batch_is_padded_with_pairs_that_ask_nothing() -> None:
    buffer = torch.full((batch_bytes(4, 3, HIDDEN, torch.float16),), 255, dtype=torch.uint8)
    batch = batch_views(buffer, 4, 3, HIDDEN, torch.float16)
    hidden, ids, weights = _inputs(2)

    fill(batch, hidden, ids, weights)

    assert batch.ids_RK.tolist() == [[0, 0, -1], [0, 0, -1], [-1] * 3, [-1] * 3]
    assert batch.weights_RK[:2, :2].tolist() == [[1, 1], [1, 1]]
    assert torch.equal(batch.hidden_RH[:2], hidden.half())


@pytest.mark.parametrize("k", [1, 8, 100])
def test_the_parts_of_a_batch_lie_apart_and_aligned(k: int) -> None:
    buffer = torch.empty(batch_bytes(16, k, HIDDEN, torch.bfloat16), dtype=torch.uint8)

    parts = batch_views(buffer, 16, k, HIDDEN, torch.bfloat16)

    starts = [part.data_ptr() - buffer.data_ptr() for part in parts]
    ends = [start + part.nbytes for start, part in zip(starts, parts, strict=True)]
    assert [start % 256 for start in starts] == [0, 0, 0]
    assert ends[0] <= starts[1] < ends[1] <= starts[2] < ends[2] == len(buffer)
