"""The router: gate, plan, fan out, combine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from expertmesh import dispatch
from expertmesh.codec.messages import ForwardRequest, ForwardResponse
from expertmesh.config import RouterConfig
from expertmesh.model import LayerSpec
from expertmesh.placement import SlotMap
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.tasks import TaskSet
from expertmesh.telemetry.metric import Histogram
from expertmesh.v1 import control_pb2
from router_service import routing, validate
from router_service.batch import Answer, LayerQueue, Member, split
from router_service.counts import AssignmentCounts
from router_service.fanout import FanOut
from router_service.kernels.avx512_sum import create_avx512_sum
from router_service.meter import DivergenceMeter
from router_service.pool import ExpertPool
from router_service.snapshot import EpochsInUse, Model, Snapshot


class Router:
    """Answers requests for the feed-forward layers of one model. Used from one event loop."""

    def __init__(self, model: Model, pool: ExpertPool, config: RouterConfig) -> None:
        self.model = model
        self.pool = pool
        self.counts = AssignmentCounts(model.spec)
        self.meter = DivergenceMeter(model, config)
        self.snapshot = Snapshot(SlotMap.of(0, model.spec, {}))
        #: Seconds that answered requests took here, by kind of layer.
        self.request_seconds = {"moe": Histogram(), "dense": Histogram()}
        self._config = config
        self._queues: dict[tuple[int, torch.dtype, bool], LayerQueue] = {}
        self._tasks = TaskSet()
        self._epochs = EpochsInUse()
        self._sum = create_avx512_sum()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="router-math")
        self._fanout = FanOut(pool, lambda: self.snapshot.slots, config)

    async def forward(self, request: ForwardRequest, deadline: Deadline) -> ForwardResponse:
        """Applies one layer to every row of the request.

        Raises InvalidRequestError and its kinds, UnavailableError, OverloadedError.
        """
        started_at = time.perf_counter()
        layer = validate.check(request, self.model.spec, self.model.layer(request.layer))
        if deadline.timeout is None:
            deadline = Deadline.after(self._config.default_timeout_s)
        if request.hidden_states.shape[0] == 0:
            answer = self._empty(request, layer)
        else:
            answer = await self._queue(layer, request.hidden_states).answer(request, deadline)
        took_s = time.perf_counter() - started_at
        # Once the answer is on its way; nobody can ask for the counts before.
        gated = request.expert_ids is not None
        asyncio.get_running_loop().call_soon(self._count, layer, answer, gated, took_s)
        return _response(request, answer, layer.top_k)

    def _count(self, layer: LayerSpec, answer: Answer, caller_gated: bool, took_s: float) -> None:
        self.counts.add(
            layer.index,
            answer.expert_ids,
            caller_gated=caller_gated,
            retried=answer.retried_pairs,
        )
        self.request_seconds[layer.kind].observe(took_s)

    def _empty(self, request: ForwardRequest, layer: LayerSpec) -> Answer:
        k = layer.top_k if request.expert_ids is None else request.expert_ids.shape[1]
        return Answer(
            request.hidden_states,
            np.empty((0, k), np.int32),
            np.empty((0, k), np.float32),
            self.snapshot,
            None,
        )

    def _queue(self, layer: LayerSpec, hidden: torch.Tensor) -> LayerQueue:
        """Where such a request waits: few rows never wait for, or in one batch with, many."""
        many = hidden.shape[0] > self._config.small_rows
        key = (layer.index, hidden.dtype, many)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = LayerQueue(
                lambda members, deadline: self._compute(layer, members, deadline),
                self._config.max_batch_rows,
                self._config.max_batches_per_layer,
                self._tasks,
                0.0 if many else self._config.overlap_after,
            )
        return queue

    async def _compute(
        self, layer: LayerSpec, members: list[Member], deadline: Deadline
    ) -> list[Answer]:
        """One batch, with one snapshot from its start to its end."""
        snapshot = self.snapshot
        epoch = snapshot.slots.epoch
        self._epochs.begin(epoch)
        try:
            return await self._answer(layer, members, snapshot, deadline)
        finally:
            self._epochs.end(epoch)

    async def _answer(
        self, layer: LayerSpec, members: list[Member], snapshot: Snapshot, deadline: Deadline
    ) -> list[Answer]:
        requests = [member.request for member in members]
        rows = sum(member.rows for member in members)
        gate = self.model.gates.get(layer.index)
        bias = snapshot.biases.get(layer.index, gate.bias if gate is not None else None)
        sampled = self.meter.rows(layer.index, rows if snapshot.mode == "adaptive" else 0)
        kernel = self.model.kernels.get(layer.index)
        batch = await self._math(
            rows, routing.route_batch, requests, layer, gate, bias, sampled, kernel
        )
        if batch.sample is not None:
            self.meter.take(layer.index, batch.sample)
        result = await self._fanout.run(batch, layer.index, snapshot, deadline)
        lent = requests[0].room if len(requests) == 1 else None
        room = None if lent is None else lent.like(batch.hidden)
        if room is None:  # nobody else uses the partial sums: one of them may take the result
            room = dispatch.reusable(batch.hidden, result.contributions)
        hidden = await self._math(
            rows, dispatch.combine, batch.hidden, result.contributions, room, self._sum
        )
        routed = batch.routed_columns
        answer = Answer(
            hidden,
            batch.expert_ids[:, :routed],
            batch.weights[:, :routed],
            snapshot,
            result.retried_T,
        )
        return split(members, answer)

    async def _math(self, rows: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs tensor work: large batches on the worker thread, never long on the event loop."""
        if rows <= self._config.inline_rows:
            return function(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, function, *arguments)

    async def samples(self) -> list[control_pb2.LayerSample]:
        """What was sampled since the last time, measured, for a report."""
        drained = self.meter.drain()
        if not drained:
            return []
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self.meter.measure, drained)

    @property
    def queues(self) -> Collection[LayerQueue]:
        """The queue of every layer and dtype that was ever asked for."""
        return self._queues.values()

    @property
    def hedges(self) -> int:
        """Parts asked of a replica because their server was slow or silent, since the start."""
        return self._fanout.hedges

    def oldest_epoch(self) -> int:
        """The oldest placement that a batch in flight uses; the newest when none is."""
        return self._epochs.oldest(self.snapshot.slots.epoch)

    def experts_without_server(self) -> int:
        """How many experts, over all layers, no connected server holds."""
        slots = self.snapshot.slots
        layers = (layer.index for layer in self.model.spec.layers)
        return sum(int((self.pool.holders(slots, i).count_E == 0).sum()) for i in layers)

    def missing(self) -> str:
        """What keeps this router from answering every request, in words; empty when nothing."""
        slots = self.snapshot.slots
        if slots.epoch == 0:
            return "no placement yet: the load controller has not been heard"
        for layer in self.model.spec.layers:
            count = self.pool.holders(slots, layer.index).count_E
            if (count == 0).any():
                expert = int((count == 0).argmax())
                return f"no connected server holds expert {expert} of layer {layer.index}"
        return ""

    async def close(self) -> None:
        """Gives up what is in flight and closes every link."""
        await self._tasks.close()
        self._fanout.close()
        await self.pool.close()
        self._worker.shutdown(wait=False)


def _response(request: ForwardRequest, answer: Answer, top_k: int) -> ForwardResponse:
    response = ForwardResponse(
        hidden_states=answer.hidden_states,
        bias_version=answer.snapshot.bias_version,
        epoch=answer.snapshot.slots.epoch,
        retried_pairs=answer.retried_pairs,
    )
    if request.want_detail:
        # Requests merged with this one may have brought more columns.
        k = top_k if request.expert_ids is None else request.expert_ids.shape[1]
        response.expert_ids = torch.from_numpy(np.ascontiguousarray(answer.expert_ids[:, :k]))
        response.expert_weights = torch.from_numpy(
            np.ascontiguousarray(answer.expert_weights[:, :k])
        )
    return response
