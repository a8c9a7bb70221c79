"""SwiGLU experts on a GPU with Triton: resident weights, recorded small batches, overlapped copies.

A batch takes one of two ways. Up to the largest bucket of rows it is padded, and the graph that was
recorded for its layer is replayed. Above, it is cut into pieces, and one is computed while the next
is copied in and the last one out. The host waits once, for the answer. R rows, K pairs asked per
row, H hidden size.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from expert_service.kernels.triton.backend.batch import Batch
from expert_service.kernels.triton.backend.buckets import (
    BUCKETS,
    bucket_rows,
    chunk_rows,
    likely_pairs,
    padded_pairs,
    warm_rows,
)
from expert_service.kernels.triton.backend.device import Device, Lane, Run, is_out_of_memory
from expert_service.kernels.triton.backend.memory import Format, does_not_fit, workspace_bytes
from expert_service.kernels.triton.backend.pipeline import Pipeline
from expert_service.kernels.triton.backend.stack import Stack
from expert_service.kernels.triton.backend.tiles import TileChoice
from expert_service.kernels.triton.experts import grouped_swiglu_experts
from expert_service.kernels.triton.tables.tiles import Tiles
from expertmesh.dispatch import partial_dtype
from expertmesh.errors import ConfigError
from expertmesh.model import ExpertWeights, Fp8ExpertWeights, LayerSpec, ModelSpec, Slot

_LOG = logging.getLogger(__name__)

#: A stack that is full grows by this part of itself: loads one by one copy it seldom.
_GROWTH = 8
_MOST_COMPILERS = 16  # threads, where there are as many cores


class TritonBackend:
    """Implements `Backend` on one device. Not thread-safe; buffers are reused between calls."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: Device,
        planned: Mapping[Slot, bool],
        *,
        takes_fp8: bool = False,
        w8a8: bool = False,
    ) -> None:
        """`planned` are the slots that will be loaded, each with whether it comes as FP8: room is
        made for all of them at the first load. `w8a8` rounds activations to FP8, too, where the
        weights are."""
        self.name = f"triton/{device.name}"
        self.takes_fp8 = takes_fp8
        self.any_thread = False  # streams and graphs belong to the device thread
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._w8a8 = w8a8
        self._tiles = TileChoice(device.chip)
        self._planned = Counter(self._format(slot, fp8) for slot, fp8 in planned.items())
        self._layers = {layer.index: _Layer(layer) for layer in spec.layers}
        self._usual_k = max(layer.k for layer in self._layers.values())
        self._pipeline = Pipeline(device, spec.hidden_size, dtype, self._usual_k)
        self._ready = False

    def host_footprint(self, weights: int, dtype: torch.dtype) -> int:
        """See Backend: 0 but under the interpreter, whose device is the host."""
        return 0 if self._device.torch_device.type == "cuda" else weights * dtype.itemsize

    def prepare(
        self, weights: ExpertWeights | Fp8ExpertWeights, pause: Callable[[], None]
    ) -> ExpertWeights | Fp8ExpertWeights:
        """The weights as they are: the copy to the device is on its stream, in turn."""
        return weights

    @torch.inference_mode()
    def load(self, slot: Slot, weights: ExpertWeights | Fp8ExpertWeights) -> None:
        """Copies one expert to the device. Raises ConfigError where it does not fit."""
        if self._planned:
            planned, self._planned = self._planned, Counter()
            self._make_room(planned)
        form = self._format(slot, isinstance(weights, Fp8ExpertWeights))
        layer = self._layers[slot.layer]
        if form not in layer.stacks:
            self._make_room(Counter({form: 1}))
        stack = layer.stacks[form]
        if stack.is_full and slot.expert not in stack:
            self._grow(stack)
        with self._device.on(Lane.COMPUTE):
            stack.put(slot.expert, weights)
        if self._ready and not layer.graphs:  # a new stack, or one that has moved
            self._record(layer)

    @torch.inference_mode()
    def drop(self, slot: Slot) -> None:
        """Forgets one expert; its memory is kept for the next. Raises KeyError if not held."""
        stack = self._layers[slot.layer].stack_of(slot.expert)
        if stack is None:
            raise KeyError(slot)
        with self._device.on(Lane.COMPUTE):
            stack.drop(slot.expert)

    @torch.inference_mode()
    def finish_loading(self) -> None:
        """Compiles every kernel, claims the memory of the largest piece, records the graphs."""
        layers = [layer for layer in self._layers.values() if layer.stacks]
        held = Counter({s.form: s.capacity for each in layers for s in each.stacks.values()})
        with self._memory_for(held):
            self._pipeline.claim_bucket()
            if self._device.compiles:
                distinct = list({layer.shape(): layer for layer in layers}.values())
                self._compile(distinct)
                for layer in distinct:
                    self._warm(layer)
            for layer in layers:
                self._record(layer)
        self._ready = True

    @torch.inference_mode()
    def compute(
        self,
        layer: int,
        hidden_RH: torch.Tensor,
        expert_ids_RK: torch.Tensor,
        weights_RK: torch.Tensor,
    ) -> torch.Tensor:
        """See `Backend.compute`."""
        held = self._layers.get(layer)
        rows, k = expert_ids_RK.shape
        if held is None or not held.stacks or not rows or not k:
            return hidden_RH.new_zeros(hidden_RH.shape, dtype=partial_dtype(hidden_RH.dtype))
        inputs = (hidden_RH, expert_ids_RK, weights_RK)
        bucket = bucket_rows(rows)
        if bucket in held.graphs and k <= held.k:
            out_RH = self._pipeline.replay(held.graphs[bucket], bucket, held.k, inputs)
        else:
            out_RH = self._pieces(held, padded_pairs(k, held.k), inputs)
        return out_RH.to(partial_dtype(hidden_RH.dtype))

    def _pieces(self, layer: _Layer, k: int, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._pipeline.run(
            lambda batch, out_RH: self._experts(layer, batch, out_RH), k, self._chunk(layer), inputs
        )

    def _experts(self, layer: _Layer, batch: Batch, out_RH: torch.Tensor) -> None:
        """Starts the kernels for a batch on the device; nothing waits."""
        rows = len(batch.ids_RK)
        sums = [
            grouped_swiglu_experts(
                batch.hidden_RH,
                batch.ids_RK,
                batch.weights_RK,
                stack.matrices,
                stack.local_slots_E,
                tiles=self._choose_tiles(layer, stack, rows),
                w8a8=self._is_w8a8(stack),
                out_dtype=torch.float32 if len(layer.stacks) > 1 else partial_dtype(self._dtype),
            )
            for stack in layer.stacks.values()
        ]
        total_RH = sums[0]
        for each_RH in sums[1:]:
            total_RH += each_RH
        out_RH.copy_(total_RH)

    def _choose_tiles(self, layer: _Layer, stack: Stack, rows: int) -> Tiles:
        pairs = likely_pairs(rows, layer.k, stack.capacity, layer.experts)
        matrices = stack.matrices
        return self._tiles.tiles(pairs, matrices.sizes, matrices.precision(self._is_w8a8(stack)))

    def _is_w8a8(self, stack: Stack) -> bool:
        return self._w8a8 and stack.form.fp8

    def _compile(self, layers: Iterable[_Layer]) -> None:
        """The products with every tile that these layers may meet, side by side on all cores: one
        after the other, they take minutes."""
        work = {
            (min(rows, 2), layer, stack, self._choose_tiles(layer, stack, rows)): None
            for layer in layers
            for rows in (*BUCKETS, *self._warm_rows(layer))
            for stack in layer.stacks.values()
        }
        threads = min(_MOST_COMPILERS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads, "compiler") as pool:
            for done in [pool.submit(self._compile_one, *each) for each in work]:
                done.result()

    @torch.inference_mode()  # of a thread
    def _compile_one(self, rows: int, layer: _Layer, stack: Stack, tiles: Tiles) -> None:
        """On rows that ask nothing; one row takes another way than two, which stand for all."""
        with self._device.on(Lane.COMPUTE):
            hidden, ids, weights = (
                each.to(self._device.torch_device) for each in self._nothing(layer, rows)
            )
            slots, w8a8 = stack.local_slots_E, self._is_w8a8(stack)
            grouped_swiglu_experts(
                hidden, ids, weights, stack.matrices, slots, tiles=tiles, w8a8=w8a8
            )

    def _warm_rows(self, layer: _Layer) -> list[int]:
        """Numbers of rows above the buckets that meet every tile, the largest first."""

        def tiles(rows: int) -> tuple[Tiles, ...]:
            return tuple(self._choose_tiles(layer, s, rows) for s in layer.stacks.values())

        return warm_rows(self._chunk(layer), tiles)

    def _warm(self, layer: _Layer) -> None:
        """Compiles what is left, and claims memory: every tile, on rows that ask nothing.

        The largest first: what it leaves in the allocator serves the others."""
        for rows in self._warm_rows(layer):
            self._pieces(layer, layer.k, self._nothing(layer, rows))

    def _record(self, layer: _Layer) -> None:
        """Records a graph for each bucket of rows."""
        for bucket in BUCKETS:
            if self._device.compiles:  # now, since a recording must not
                self._pieces(layer, layer.k, self._nothing(layer, bucket))
            layer.graphs[bucket] = self._pipeline.record(
                lambda batch, out_RH: self._experts(layer, batch, out_RH), bucket, layer.k
            )

    def _nothing(self, layer: _Layer, rows: int) -> tuple[torch.Tensor, ...]:
        """A batch that asks for no expert."""
        hidden = torch.zeros(rows, self._spec.hidden_size, dtype=self._dtype, device="cpu")
        ids = torch.full((rows, layer.k), -1, dtype=torch.int32, device="cpu")
        return hidden, ids, torch.zeros(rows, layer.k, dtype=torch.float32, device="cpu")

    def _make_room(self, counts: Counter[Format]) -> None:
        """Allocates stacks, all or none. Raises ConfigError."""
        self._check_memory(counts)
        with self._memory_for(counts), self._device.on(Lane.COMPUTE):
            stacks = [self._new_stack(form, count) for form, count in counts.items()]
        for stack in stacks:
            layer = self._layers[stack.form.layer]
            layer.stacks[stack.form] = stack
            layer.graphs.clear()

    def _new_stack(self, form: Format, capacity: int) -> Stack:
        experts = self._layers[form.layer].experts
        device = self._device.torch_device
        return Stack(form, self._spec.hidden_size, self._dtype, experts, capacity, device)

    def _grow(self, stack: Stack) -> None:
        rows = max(1, stack.capacity // _GROWTH)
        counts = Counter({stack.form: stack.capacity + rows})  # the old one goes after the copy
        self._check_memory(counts)
        with self._memory_for(counts), self._device.on(Lane.COMPUTE):
            stack.grow(rows)
        self._layers[stack.form.layer].graphs.clear()
        _LOG.info("layer %d: room for %d experts", stack.form.layer, stack.capacity)

    def _check_memory(self, counts: Counter[Format]) -> None:
        free = self._device.free_bytes()
        if free is None:
            return
        sizes = (form.slot_bytes(self._spec.hidden_size, self._dtype) for form in counts.elements())
        if sum(sizes) + self._workspace(counts) > free:
            raise self._too_small(counts)

    @contextmanager
    def _memory_for(self, counts: Counter[Format]) -> Iterator[None]:
        """What runs out of memory within is a ConfigError: another server may have taken it."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._too_small(counts) from error

    def _too_small(self, counts: Counter[Format]) -> ConfigError:
        return does_not_fit(
            counts,
            self._spec.hidden_size,
            self._dtype,
            self._workspace(counts),
            self._device.free_bytes() or 0,
            self._device.name,
        )

    def _workspace(self, counts: Counter[Format]) -> int:
        """What is yet to be claimed beside the weights: nothing, once loading is finished."""
        if self._ready:
            return 0
        by_layer: Counter[int] = Counter()
        for form, count in counts.items():
            by_layer[form.layer] += count
        experts = max(by_layer.values(), default=0)
        return workspace_bytes(
            counts,
            experts,
            chunk_rows(experts, self._usual_k),
            self._usual_k,
            self._spec.hidden_size,
            partial_dtype(self._dtype).itemsize,
        )

    def _format(self, slot: Slot, fp8: bool) -> Format:
        layer = self._spec.layer(slot.layer)
        assert layer is not None  # the shard has checked the slot
        return Format(slot.layer, layer.width(slot.expert), fp8)

    def _chunk(self, layer: _Layer) -> int:
        return chunk_rows(sum(s.capacity for s in layer.stacks.values()), layer.k)


class _Layer:
    """One layer's stacks by format, and its recorded batches by bucket."""

    def __init__(self, spec: LayerSpec) -> None:
        self.experts = spec.num_experts + spec.has_shared
        self.k = spec.top_k + spec.has_shared  # what a router asks for
        self.stacks: dict[Format, Stack] = {}
        self.graphs: dict[int, Run] = {}

    def stack_of(self, expert: int) -> Stack | None:
        """The stack that holds an expert, or None."""
        return next((stack for stack in self.stacks.values() if expert in stack), None)

    def shape(self) -> tuple[object, ...]:
        """Equal for layers whose kernels and needs are the same."""
        return (self.k, *((f.width, f.fp8, s.capacity) for f, s in self.stacks.items()))
