"""The device thread against a real shard on the reference backend."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

from expert_service.kernels.reference import ReferenceBackend
from expert_service.runner import DeviceRunner, QuickWork
from expert_service.shard import ExpertShard
from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.config import ExpertConfig
from expertmesh.errors import (
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    SlotNotHeldError,
    UnavailableError,
)
from expertmesh.model import ExpertWeights, GateSpec, LayerSpec, ModelSpec, Slot
from expertmesh.rpc.deadline import Deadline

H, E = 8, 4
LAYER = LayerSpec(
    index=0, num_experts=E, intermediate_size=6, shared_intermediate_size=0,
    gate=GateSpec(score="softmax", top_k=2),
)  # fmt: skip
SPEC = ModelSpec(model_type="t", hidden_size=H, dtype=torch.float32, layers=(LAYER,))


class Backend(ReferenceBackend):
    """Notes how many rows each call brought."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def compute(self, layer: int, hidden: torch.Tensor, *pairs: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(hidden))
        return super().compute(layer, hidden, *pairs)


def _shard() -> tuple[ExpertShard, Backend]:
    generator = torch.Generator().manual_seed(0)
    backend = Backend()
    slots = [Slot(0, expert) for expert in range(E)]
    shard = ExpertShard(SPEC, slots, backend)

    def read(slot: Slot) -> ExpertWeights:
        gate, up = (torch.randn(6, H, generator=generator) for _ in range(2))
        return ExpertWeights(gate, up, torch.randn(H, 6, generator=generator))

    shard.load(read, lambda slot: None)
    return shard, backend


def _request(rows: int, seed: int) -> ExecuteRequest:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, E, generator=generator).topk(2).indices.int()
    return ExecuteRequest(
        layer=0,
        hidden_states=torch.randn(rows, H, generator=generator),
        expert_ids=ids.numpy(),
        expert_weights=torch.rand(rows, 2, generator=generator).numpy(),
    )


def _expected(shard: ExpertShard, request: ExecuteRequest) -> torch.Tensor:
    return shard.execute(0, request.hidden_states, request.expert_ids, request.expert_weights)


def _run(
    scenario: Callable[[DeviceRunner, ExpertShard, Backend, threading.Event], Awaitable[Any]],
    threads: int = 1,
    **config: int,
) -> Any:
    """Runs a scenario while the device waits for its event."""

    async def run() -> Any:
        shard, backend = _shard()
        runner = DeviceRunner(shard, threads, ExpertConfig(**config))  # type: ignore[arg-type]
        gate = threading.Event()
        held = asyncio.ensure_future(runner.call(gate.wait))
        try:
            return await scenario(runner, shard, backend, gate)
        finally:
            gate.set()
            await asyncio.wait((held,))
            runner.close()

    return asyncio.run(run())


def _submit(runner: DeviceRunner, request: ExecuteRequest) -> asyncio.Task[ExecuteResponse]:
    return asyncio.ensure_future(runner.execute(request, Deadline.after(30.0)))


def test_requests_that_wait_together_are_computed_together_and_each_gets_its_rows() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        requests = [_request(rows, seed=rows) for rows in (1, 3, 2)]
        tasks = [_submit(runner, request) for request in requests]
        await asyncio.sleep(0)
        gate.set()
        answers = [(await task).hidden_states for task in tasks]
        calls = list(backend.calls)
        return answers, [_expected(shard, request) for request in requests], calls

    answers, expected, calls = _run(scenario)

    assert calls == [6]
    for answer, right in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, right)


def test_a_bad_request_fails_alone() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        bad = _request(2, 1)
        bad.expert_ids[1] = [3, 3]
        tasks = [_submit(runner, _request(1, 0)), _submit(runner, bad)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    right, wrong = _run(scenario)

    assert right.hidden_states.shape == (1, H)
    assert isinstance(wrong, InvalidRequestError)


def test_a_large_request_lets_a_small_one_pass_and_is_answered_whole() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        large, small = _request(25, 0), _request(1, 1)
        finished: list[str] = []
        tasks = [_submit(runner, large), _submit(runner, small)]
        for name, task in zip(("large", "small"), tasks, strict=True):
            task.add_done_callback(lambda _, name=name: finished.append(name))
        await asyncio.sleep(0)
        gate.set()
        answer = (await tasks[0]).hidden_states
        calls = list(backend.calls)
        return finished, calls, answer, _expected(shard, large), shard.execution_counts()

    finished, calls, answer, expected, counts = _run(scenario, merge_rows=4, block_rows=10)

    assert finished[0] == "small"
    assert calls == [10, 1, 15]
    torch.testing.assert_close(answer, expected)
    assert int(counts[0].sum()) == 2 * (25 + 1 + 25)


def test_a_slot_that_goes_while_a_request_waits_is_missed_and_not_computed() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        request = _request(1, 0)
        waiting = _submit(runner, request)
        await asyncio.sleep(0)
        dropped = asyncio.ensure_future(
            runner.call(shard.drop, Slot(0, int(request.expert_ids[0, 0])))
        )
        await asyncio.sleep(0)
        gate.set()
        await dropped
        with pytest.raises(SlotNotHeldError):
            await waiting
        return list(backend.calls)

    assert _run(scenario) == []


def test_a_request_given_up_while_it_waits_is_never_computed() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        gone, other = _submit(runner, _request(3, 0)), _submit(runner, _request(2, 1))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.set()
        await other
        return list(backend.calls)

    assert _run(scenario) == [2]


def test_a_turn_that_comes_too_late_is_a_deadline_error() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        late = asyncio.ensure_future(runner.execute(_request(1, 0), Deadline.after(0.0)))
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(DeadlineError):
            await late
        return list(backend.calls)

    assert _run(scenario) == []


def test_a_full_queue_refuses_and_a_closed_one_fails_what_waits() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        waiting = _submit(runner, _request(1, 0))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await runner.execute(_request(1, 1), Deadline.after(1.0))
        runner.close()
        gate.set()
        outcomes = await asyncio.gather(waiting, return_exceptions=True)
        with pytest.raises(UnavailableError):
            await runner.execute(_request(1, 1), Deadline.after(1.0))
        return outcomes

    (outcome,) = _run(scenario, max_queue=1)

    assert isinstance(outcome, UnavailableError)


def test_a_call_that_raises_tells_its_caller_and_the_thread_goes_on() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        gate.set()
        with pytest.raises(ZeroDivisionError):
            await runner.call(lambda: 1 // 0)
        return (await _submit(runner, _request(2, 0))).hidden_states.shape

    assert _run(scenario) == (2, H)


def _now(runner: DeviceRunner, request: ExecuteRequest) -> ExecuteResponse | None:
    """`execute_now` once the device thread, which answers first, has let go of the shard."""
    with runner._device:
        pass
    return runner.execute_now(request)


def test_work_that_is_quick_is_done_on_the_event_loop_once_that_is_known() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        gate.set()
        request = _request(1, seed=1)
        before = runner.execute_now(request)
        for _ in range(3):
            await runner.execute(request, Deadline.after(30.0))
        return before, _now(runner, request), _expected(shard, request), runner.rows

    before, now, expected, rows = _run(scenario, inline_compute_s=10.0)

    assert before is None  # nobody knows yet how long it takes
    torch.testing.assert_close(now.hidden_states, expected)
    assert rows == 4


@pytest.mark.parametrize("threads", [1, 2])
def test_waiting_for_other_threads_is_not_quick_but_waiting_for_a_core_is(threads: int) -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        gate.set()
        compute = backend.compute

        def compute_elsewhere(*arguments: Any) -> torch.Tensor:
            threading.Event().wait(0.02)  # as its own threads' work, or another process's turn
            return compute(*arguments)  # type: ignore[no-any-return]

        backend.compute = compute_elsewhere
        await runner.execute(_request(1, seed=1), Deadline.after(30.0))
        return _now(runner, _request(1, seed=1))

    now = _run(scenario, threads=threads, inline_compute_s=0.015)

    assert (now is not None) == (threads == 1)


def test_nothing_is_done_on_the_event_loop_while_the_device_is_in_use() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        gate.set()
        request = _request(1, seed=1)
        await runner.execute(request, Deadline.after(30.0))
        in_use, release = threading.Event(), threading.Event()
        held = asyncio.ensure_future(runner.call(lambda: in_use.set() or release.wait()))
        await asyncio.to_thread(in_use.wait)
        during = runner.execute_now(request)
        waiting = _submit(runner, request)
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(held, waiting)
        return during, _now(runner, request)

    during, after = _run(scenario, inline_compute_s=10.0)

    assert during is None
    assert after is not None


def test_a_bad_request_is_refused_on_the_event_loop_too() -> None:
    async def scenario(runner, shard, backend, gate):  # type: ignore[no-untyped-def]
        gate.set()
        await runner.execute(_request(1, seed=1), Deadline.after(30.0))
        bad = _request(1, seed=2)
        bad.expert_ids = np.array([[0, E + 3]], np.int32)
        with pytest.raises(SlotNotHeldError):
            _now(runner, bad)
        return _now(runner, _request(1, seed=3))

    assert _run(scenario, inline_compute_s=10.0) is not None


def test_one_slow_outlier_sends_work_back_to_the_device_thread_until_it_is_quick_again() -> None:
    quick = QuickWork(1e-4)
    quick.learn("layer", 1, 50_000)
    assert quick.expects("layer", 1)
    assert not quick.expects("layer", 2)

    quick.learn("layer", 1, 1_000_000)
    assert not quick.expects("layer", 1)
    for _ in range(10):
        quick.learn("layer", 1, 50_000)
    assert quick.expects("layer", 1)
