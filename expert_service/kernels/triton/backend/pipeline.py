"""Moves batches through a device: copied in, computed and copied out, each on a lane of its own.

R rows, K pairs asked per row, H hidden size. Everything on the device is in the dtype that the
experts compute in, but answers of float16 experts, which are float32 (`dispatch.partial_dtype`);
the host converts while it fills the pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from expert_service.kernels.triton.backend.batch import Batch, batch_bytes, batch_views, fill
from expert_service.kernels.triton.backend.buckets import BUCKETS, split_rows
from expert_service.kernels.triton.backend.device import Device, Lane, Mark, Run
from expertmesh.dispatch import partial_dtype

#: Starts the kernels for a batch, whose sum goes to the second argument, [R, H].
Kernels = Callable[[Batch, torch.Tensor], None]


class Pipeline:
    """The buffers and lanes of one backend. Not thread-safe."""

    def __init__(self, device: Device, hidden_size: int, dtype: torch.dtype, usual_k: int) -> None:
        """`usual_k` is the largest K of a recorded batch."""
        self._device = device
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._out_dtype = partial_dtype(dtype)
        self._usual_k = usual_k
        self._pieces = [_Buffers(device), _Buffers(device)]  # one is copied, one computed
        self._bucket = _Buffers(device)
        self._bucket_host = torch.empty(0, dtype=torch.uint8, device="cpu")

    def claim_bucket(self) -> None:
        """Takes the fixed buffers that batches are recorded with."""
        rows = BUCKETS[-1]
        size = batch_bytes(rows, self._usual_k, self._hidden_size, self._dtype)
        self._bucket.reserve(size, self._row_bytes(rows))
        self._bucket_host = self._device.host_bytes(size)
        self._bucket_host.zero_()

    def record(self, kernels: Kernels, bucket: int, k: int) -> Run:
        """The kernels on a padded batch as something that can be repeated: see `replay`."""
        batch = self._views(self._bucket.input, bucket, k)
        out_RH = self._rows(self._bucket.output, bucket)
        return self._device.record(lambda: kernels(batch, out_RH))

    def replay(
        self, recorded: Run, bucket: int, k: int, inputs: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """A batch of at most `bucket` rows and `k` pairs a row, with what `record` made of them.

        `inputs` are hidden states, ids and weights. The answer [R, H] is memory of its own.
        """
        rows = len(inputs[0])
        out_RH = self._host_rows(rows)
        fill(self._views(self._bucket_host, bucket, k), *inputs)
        size = batch_bytes(bucket, k, self._hidden_size, self._dtype, filled=rows)
        self._start(self._bucket, self._bucket_host[:size], recorded, out_RH).synchronize()
        return out_RH

    def run(
        self, kernels: Kernels, k: int, chunk: int, inputs: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """A batch of any size, at least one row, in pieces of at most `chunk` rows: one is computed
        while the next is copied in and the last one out."""
        out_RH = self._host_rows(len(inputs[0]))
        pieces = split_rows(len(out_RH), chunk)
        largest = max(stop - start for start, stop in pieces)
        for buffers in self._pieces[: len(pieces)]:
            size = batch_bytes(largest, k, self._hidden_size, self._dtype)
            buffers.reserve(size, self._row_bytes(largest))
        for index, (start, stop) in enumerate(pieces):
            rows, buffers = stop - start, self._pieces[index % len(self._pieces)]
            host = self._device.host_bytes(batch_bytes(rows, k, self._hidden_size, self._dtype))
            fill(self._views(host, rows, k), *(tensor[start:stop] for tensor in inputs))
            batch = self._views(buffers.input, rows, k)
            result_RH = self._rows(buffers.output, rows)

            def compute(batch: Batch = batch, result_RH: torch.Tensor = result_RH) -> None:
                kernels(batch, result_RH)

            end = self._start(buffers, host, compute, out_RH[start:stop])
        end.synchronize()
        return out_RH

    def _start(self, buffers: _Buffers, host: torch.Tensor, run: Run, out_RH: torch.Tensor) -> Mark:
        """Each lane waits, on the device, for what it needs and for the buffers' last use; the
        mark is that of the answer's arrival in `out_RH`."""
        device = self._device
        with device.on(Lane.COPY_IN):
            buffers.computed.wait()
            buffers.input[: len(host)].copy_(host, non_blocking=True)
            arrived = device.mark()
        with device.on(Lane.COMPUTE):
            arrived.wait()
            buffers.sent.wait()
            run()
            buffers.computed = device.mark()
        with device.on(Lane.COPY_OUT):
            buffers.computed.wait()
            out_RH.copy_(self._rows(buffers.output, len(out_RH)), non_blocking=True)
            buffers.sent = device.mark()
        return buffers.sent

    def _host_rows(self, rows: int) -> torch.Tensor:
        """Memory of its own for an answer: the caller keeps it for as long as it likes."""
        return self._rows(self._device.host_bytes(self._row_bytes(rows)), rows)

    def _row_bytes(self, rows: int) -> int:
        return rows * self._hidden_size * self._out_dtype.itemsize

    def _rows(self, buffer: torch.Tensor, rows: int) -> torch.Tensor:
        values = buffer[: self._row_bytes(rows)].view(self._out_dtype)
        return values.view(rows, self._hidden_size)

    def _views(self, buffer: torch.Tensor, rows: int, k: int) -> Batch:
        return batch_views(buffer, rows, k, self._hidden_size, self._dtype)


class _Buffers:
    """Device memory for the inputs and the output of one batch, and when it is free again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.input = torch.empty(0, dtype=torch.uint8, device=device.torch_device)
        self.output = self.input
        self.computed = self.sent = device.mark()

    def reserve(self, input_bytes: int, output_bytes: int) -> None:
        """Room for that much, with any content. The buffers must be at rest."""
        with self._device.on(Lane.COMPUTE):
            if len(self.input) < input_bytes:
                self.input = self.input.new_empty(input_bytes)
            if len(self.output) < output_bytes:
                self.output = self.output.new_empty(output_bytes)
            # Whatever an allocator does to fresh memory comes before the first copy into it.
            self.computed = self._device.mark()
