"""Whole experts beside each other: how they are divided, and that nothing else changes."""

from __future__ import annotations

import gc
import threading
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_service.kernels.cpu import onednn
from expert_service.kernels.cpu.crew import Crew, divide
from expert_service.kernels.cpu.onednn import OneDnnBackend
from expertmesh.model import ExpertWeights, LayerSpec, ModelSpec, Slot

H, E, K = 256, 8, 4


class Places(NamedTuple):
    start: int
    stop: int


def places(*rows: int) -> list[Places]:
    """Spans of so many rows, one after the other."""
    stops = [sum(rows[: at + 1]) for at in range(len(rows))]
    return [Places(stop - size, stop) for stop, size in zip(stops, rows, strict=True)]


@pytest.mark.parametrize(
    ("rows", "threads", "parts"),
    [
        ((4, 4, 4, 4, 4, 4), 2, [3, 3]),
        ((4, 4, 4), 2, [1, 2]),  # reading: a third longer is less than what meeting takes
        ((384, 384, 256), 2, [3]),  # arithmetic: it is not
        ((1000, 24), 2, [2]),
        ((4,), 8, [1]),
        ((4, 4), 8, [1, 1]),
        ((4, 4, 4, 4), 1, [4]),
    ],
)  # fmt: skip
def test_experts_are_divided_where_that_is_sooner(
    rows: tuple[int, ...], threads: int, parts: list[int]
) -> None:
    assert [len(part) for part in divide(places(*rows), threads)] == parts


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.integers(1, 1024), min_size=1, max_size=40), threads=st.integers(1, 16))
def test_every_span_is_in_one_part_in_its_order(rows: list[int], threads: int) -> None:
    spans = places(*rows)

    parts = divide(spans, threads)

    assert [span for part in parts for span in part] == spans
    assert len(parts) <= threads
    assert all(parts)


def test_jobs_run_at_the_same_time_with_the_threads_divided_among_them() -> None:
    here = torch.get_num_threads()
    meet = threading.Barrier(2, timeout=30.0)

    def job() -> tuple[int, bool]:
        meet.wait()  # both are under way
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    done = Crew(6).run([job, job])

    assert done == [(3, True), (3, True)]
    assert torch.get_num_threads() == here


def test_what_a_job_raises_is_raised_once_all_have_ended() -> None:
    ended = threading.Event()
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise RuntimeError("no memory")

    def late() -> None:
        assert failed.wait(30.0)
        ended.set()

    with pytest.raises(RuntimeError, match="no memory"):
        Crew(2).run([fail, late])
    assert ended.is_set()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tasks", [0, 1, 2, 50])
def test_shared_tasks_are_done_once_each(threads: int, tasks: int) -> None:
    done: list[int] = []
    crew = Crew(threads)

    for _ in range(3):
        done.clear()
        crew.share([partial(done.append, at) for at in range(tasks)])
        assert sorted(done) == list(range(tasks))


def test_the_caller_and_others_share_tasks_at_the_same_time() -> None:
    meet = threading.Barrier(3, timeout=30.0)
    by: list[int] = []

    def task() -> None:
        meet.wait()
        by.append(threading.get_ident())

    Crew(3).share([task] * 3)

    assert len(set(by)) == 3
    assert threading.get_ident() in by


@pytest.mark.parametrize("fails", ["caller", "other"])
def test_what_a_shared_task_raises_is_raised_once_all_have_ended(fails: str) -> None:
    here = threading.get_ident()
    meet = threading.Barrier(2, timeout=30.0)
    ended: list[bool] = []

    def task() -> None:
        meet.wait()  # one each
        if (threading.get_ident() == here) == (fails == "caller"):
            raise RuntimeError("no memory")
        ended.append(True)

    crew = Crew(2)
    with pytest.raises(RuntimeError, match="no memory"):
        crew.share([task, task])

    assert ended == [True]
    assert crew.run([lambda: 1, lambda: 2]) == [1, 2], "it works on"


def test_threads_end_with_their_crew() -> None:
    crew = Crew(3)
    crew.run([lambda: None] * 3)
    threads = [thread for thread in threading.enumerate() if thread.name == "experts"]

    del crew
    gc.collect()

    for thread in threads[-3:]:
        thread.join(timeout=30.0)
        assert not thread.is_alive()


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad], ids=["inference", "no_grad"]
)
def test_outputs_are_those_of_one_expert_after_the_other(
    mode: type, rows: int, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(rows)
    layer = LayerSpec(index=0, num_experts=E, intermediate_size=96, shared_intermediate_size=0)
    spec = ModelSpec(model_type="test", hidden_size=H, dtype=torch.bfloat16, layers=(layer,))
    backend = OneDnnBackend(spec, torch.bfloat16, 2, weights)
    for expert in range(E):
        matrices = [
            torch.randn(*shape, generator=generator) for shape in ((96, H), (96, H), (H, 96))
        ]
        backend.load(Slot(0, expert), ExpertWeights(*(m.bfloat16() / 16 for m in matrices)))
    hidden = torch.randn(rows, H, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(rows)]).int()
    gate = torch.rand(rows, K, generator=generator)
    runs: list[int] = []
    run = Crew.run

    def counted(crew: Crew, jobs: list) -> list:  # type: ignore[type-arg]
        runs.append(len(jobs))
        return run(crew, jobs)

    monkeypatch.setattr(Crew, "run", counted)

    with mode():
        alone = backend.compute(0, hidden, ids, gate)  # too few bytes for a crew
        monkeypatch.setattr(onednn, "_CREW_BYTES", 0)
        beside = backend.compute(0, hidden, ids, gate)

    assert runs == [2]
    torch.testing.assert_close(beside, alone, rtol=1e-2, atol=1e-2)
    assert (beside - alone).float().norm() <= 1e-3 * alone.float().norm()
