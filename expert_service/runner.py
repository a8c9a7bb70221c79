"""The device thread: computes what waits in turn, never on the event loop."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch

from expert_service.device_queue import DeviceQueue, Job, Piece
from expert_service.device_use import DeviceUse
from expert_service.shard import ExpertShard, RowWeights
from expertmesh import average
from expertmesh.codec.messages import ExecuteRequest, ExecuteResponse
from expertmesh.config import ExpertConfig
from expertmesh.dispatch import Ids
from expertmesh.errors import OverloadedError, UnavailableError
from expertmesh.rpc.admission import RETRY_AFTER_S
from expertmesh.rpc.deadline import Deadline
from expertmesh.telemetry.metric import Histogram

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Request(Job):
    """One request on the device."""

    request: ExecuteRequest = field(kw_only=True)
    deadline: Deadline = field(kw_only=True)
    future: asyncio.Future[ExecuteResponse] = field(kw_only=True)
    queued_at_ns: int = field(kw_only=True)
    drops: int = 0  # of the shard, when the request was checked
    started_at_ns: int = 0
    compute_ns: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """Anything else that the device thread shall do, between two turns."""

    run: Callable[[], object]
    future: asyncio.Future[Any]


class DeviceRunner:
    """Owns one thread and a bounded queue before it."""

    def __init__(self, shard: ExpertShard, threads: int, config: ExpertConfig) -> None:
        """`threads` is what torch may use for each operation on the CPU."""
        self._shard = shard
        self._threads = threads
        self._max_queue = config.max_queue
        self._waiting = DeviceQueue(config.merge_rows, config.block_rows)
        self._queued = 0
        self.use = DeviceUse()
        self._served_at = -math.inf
        self.queue_seconds = Histogram()
        self.compute_seconds = Histogram()
        self.rows = 0  # computed since the start
        self._arrivals: SimpleQueue[_Request | _Call | None] = SimpleQueue()
        self._device = threading.Lock()  # held by whoever uses the shard
        self._inference = torch.inference_mode()  # of the event loop: made once, entered often
        self._quick = QuickWork(config.inline_compute_s if shard.any_thread else 0.0)
        # What a call takes of its thread. Time in which other processes had the core does not
        # count: it would send what is quick on the longer way just when cores are wanted. With
        # more threads the calling one may only wait for them, so there the clock has to do.
        self._spent_ns = time.thread_time_ns if threads == 1 else time.perf_counter_ns
        self._loop = asyncio.get_running_loop()
        self._closed = False
        #: Raises what ended the device thread, when that was not `close`.
        self.died: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._work, name="device", daemon=True).start()

    async def execute(self, request: ExecuteRequest, deadline: Deadline) -> ExecuteResponse:
        """Computes one request in its turn.

        Raises OverloadedError when the queue is full, DeadlineError when the turn comes too late,
        and what `ExpertShard.check` raises.
        """
        if self._queued >= self._max_queue:
            raise OverloadedError(
                f"{self._queued} requests wait for the device, the limit is {self._max_queue}: "
                "retry later or on a replica",
                retry_after_s=RETRY_AFTER_S,
            )
        self._queued += 1
        self.use.enter()
        try:
            job = self._job(request, deadline)
            self._submit(job)
            response = await job.future
        finally:
            self._queued -= 1
            self.use.leave()
        self._observe(response, job.rows)
        return response

    def execute_now(self, request: ExecuteRequest) -> ExecuteResponse | None:
        """Computes one request on the event loop; None where it is to take its turn.

        Work that takes less time than two thread hops is done where it is, when nobody waits for
        the device or is on it. Raises what `ExpertShard.check` raises.
        """
        if self._queued or self._closed:
            return None
        job_key, rows = _key(request)
        if not self._quick.expects(job_key, rows) or not self._device.acquire(blocking=False):
            return None
        self.use.enter()
        started_at_ns, spent_ns = time.perf_counter_ns(), self._spent_ns()
        try:
            with self._inference:
                output = self._shard.execute(
                    request.layer,
                    request.hidden_states,
                    request.expert_ids,
                    request.expert_weights,
                )
            spent_ns = self._spent_ns() - spent_ns
            took_ns = time.perf_counter_ns() - started_at_ns
            self.use.worked(took_ns)
        finally:
            self._device.release()
            self.use.leave()
        self._quick.learn(job_key, rows, spent_ns)
        response = ExecuteResponse(hidden_states=output, compute_us=took_ns // 1000)
        self._observe(response, rows)
        return response

    def _job(self, request: ExecuteRequest, deadline: Deadline) -> _Request:
        return _Request(
            *_key(request),
            request=request,
            deadline=deadline,
            future=self._loop.create_future(),
            queued_at_ns=time.perf_counter_ns(),
        )

    def _observe(self, response: ExecuteResponse, rows: int) -> None:
        self.queue_seconds.observe(response.queue_us / 1e6)
        self.compute_seconds.observe(response.compute_us / 1e6)
        self.rows += rows
        self._served_at = time.monotonic()

    @property
    def queued(self) -> int:
        """Requests before the device and on it."""
        return self._queued

    def served_within(self, seconds: float) -> bool:
        """Whether a request is there, or was that short a time ago."""
        return self._queued > 0 or time.monotonic() - self._served_at < seconds

    async def call(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Runs anything on the device thread, after what waits there now."""
        future: asyncio.Future[_T] = self._loop.create_future()
        self._submit(_Call(lambda: function(*arguments), future))
        return await future

    def close(self) -> None:
        """Ends the thread after what it is doing; what waits fails with UnavailableError."""
        self._closed = True
        self._arrivals.put(None)

    def _submit(self, work: _Request | _Call) -> None:
        if self._closed:
            raise UnavailableError("this expert server is stopping", retry_after_s=1.0)
        self._arrivals.put(work)

    # What follows runs on the device thread.

    def _work(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            with torch.inference_mode():
                while self._take_arrivals():
                    self._take_turn()
        except Exception as error:  # requests' own are told to who asked: this is a bug of ours
            self._closed = True
            self._settle(self.died, error)

    def _take_turn(self) -> None:
        """Computes what comes next, and keeps nothing of it: a caller may wait for its memory."""
        with self._device:
            pieces = [piece for piece in self._waiting.next() if self._begin(piece)]
            if pieces:
                self._compute(pieces)

    def _take_arrivals(self) -> bool:
        """Moves what has arrived into the queue; waits when that is empty. False at the end."""
        try:
            while True:
                work = self._arrivals.get(block=not self._waiting)
                if work is None:
                    self._fail_all()
                    return False
                with self._device:
                    if isinstance(work, _Call):
                        self._call(work)
                    elif self._is_valid(work):
                        self._waiting.push(work)
        except Empty:
            return True

    def _call(self, call: _Call) -> None:
        try:
            self._settle(call.future, call.run())
        except Exception as error:
            self._settle(call.future, error)

    def _is_valid(self, job: _Request) -> bool:
        """Whether it can be computed with others; the caller is told when it cannot."""
        request = job.request
        try:
            self._shard.check(
                request.layer, request.hidden_states, request.expert_ids, request.expert_weights
            )
        except Exception as error:
            self._settle(job.future, error)
            return False
        job.drops = self._shard.drops
        return True

    def _begin(self, piece: Piece) -> bool:
        """Whether somebody still waits for a job's answer, in time."""
        job = piece.job
        assert isinstance(job, _Request)
        if not job.started_at_ns:
            job.started_at_ns = time.perf_counter_ns()
            try:
                job.deadline.check()
            except Exception as error:
                self._settle(job.future, error)
                return False
        if job.drops != self._shard.drops and not self._is_valid(job):
            return False
        return not job.future.done()

    def _compute(self, pieces: list[Piece]) -> None:
        started_at_ns, spent_ns = time.perf_counter_ns(), self._spent_ns()
        jobs: list[_Request] = [piece.job for piece in pieces]  # type: ignore[misc]
        try:
            outputs = self._execute(jobs, pieces)
        except Exception as error:
            for job in jobs:
                self._settle(job.future, error)
            return
        took_ns = time.perf_counter_ns() - started_at_ns
        self.use.worked(took_ns)
        if len(pieces) == 1 and pieces[0].stop == jobs[0].rows:
            self._quick.learn(jobs[0].key, jobs[0].rows, self._spent_ns() - spent_ns)
        for job, piece, output in zip(jobs, pieces, outputs, strict=True):
            job.compute_ns += took_ns
            job.outputs.append(output)
            if piece.stop == job.rows:
                self._settle(job.future, _response(job))

    def _execute(self, jobs: list[_Request], pieces: list[Piece]) -> tuple[torch.Tensor, ...]:
        """One call of the backend for all pieces."""
        layer = jobs[0].request.layer
        parts = [_rows_of(piece, job) for piece, job in zip(pieces, jobs, strict=True)]
        if len(parts) == 1:
            return (self._shard.compute(layer, *parts[0]),)
        hidden, ids, weights = zip(*parts, strict=True)
        output = self._shard.compute(
            layer, torch.cat(hidden), np.concatenate(ids), np.concatenate(weights)
        )
        outputs: tuple[torch.Tensor, ...] = output.split([p.stop - p.start for p in pieces])
        return outputs

    def _fail_all(self) -> None:
        while pieces := self._waiting.next():
            for piece in pieces:
                assert isinstance(piece.job, _Request)
                error = UnavailableError("this expert server is stopping", retry_after_s=1.0)
                self._settle(piece.job.future, error)

    def _settle(self, future: asyncio.Future[Any], outcome: object) -> None:
        with suppress(RuntimeError):  # the event loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(_set, future, outcome)


def _rows_of(piece: Piece, job: _Request) -> tuple[torch.Tensor, Ids, RowWeights]:
    """What a piece is to compute."""
    request, rows = job.request, slice(piece.start, piece.stop)
    if piece.stop - piece.start == job.rows:
        return request.hidden_states, request.expert_ids, request.expert_weights
    return request.hidden_states[rows], request.expert_ids[rows], request.expert_weights[rows]


def _key(request: ExecuteRequest) -> tuple[Hashable, int]:
    """(what requests that can be computed together have in common, rows)."""
    hidden = request.hidden_states
    shape = hidden.shape
    key = (request.layer, hidden.dtype, shape[1:], request.expert_ids.shape[1:])
    return key, shape[0] if shape else 0


class QuickWork:
    """Knows which requests take so little time that a thread hop would be the longer part.

    Measured times of single requests, by kind and size; one slow outlier sends a kind back to the
    device thread, where it is measured again.
    """

    def __init__(self, limit_s: float) -> None:
        """Work below `limit_s` is quick; with 0 none is."""
        self._limit_ns = limit_s * 1e9
        self._usual_ns: dict[tuple[Hashable, int], float] = {}

    def expects(self, key: Hashable, rows: int) -> bool:
        """Whether so many rows are expected to be quick; not before they have been measured."""
        return self._usual_ns.get((key, rows.bit_length()), math.inf) < self._limit_ns

    def learn(self, key: Hashable, rows: int, took_ns: int) -> None:
        """Notes how long one request took."""
        size = (key, rows.bit_length())
        usual = self._usual_ns.get(size, float(took_ns))
        self._usual_ns[size] = average.moved(usual, took_ns)


def _set(future: asyncio.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _response(job: _Request) -> ExecuteResponse:
    return ExecuteResponse(
        hidden_states=job.outputs[0] if len(job.outputs) == 1 else _joined(job),
        queue_us=(job.started_at_ns - job.queued_at_ns) // 1000,
        compute_us=job.compute_ns // 1000,
    )


def _joined(job: _Request) -> torch.Tensor:
    room, hidden = job.request.room, job.request.hidden_states
    fits = room is not None and hidden.dtype == job.outputs[0].dtype
    return torch.cat(job.outputs, out=room.like(hidden) if room is not None and fits else None)
