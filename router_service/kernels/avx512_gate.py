"""A gate in one call of our own code, on CPUs with AVX-512 BF16: logits, scores and choice.

It computes what `expertmesh.gating.route` does, for hidden states and weights in bfloat16. Logits
are then sums in float32 of exact products, which AVX-512 BF16 adds up at twice the rate of float32,
and the choice follows while they are in the cache, where torch takes several more calls
(docs/cpu.md has what was measured). The code is `avx512_gate_ir`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.gating import Routing
from expertmesh.kernels.compiling import BLOCK, Library, has_compiler, has_dot, pack_blocks
from expertmesh.model import GateSpec, GateWeights

#: What a thread is given is worth its waking.
_THREAD_ROWS = 128
#: More rows are only worth it where the alternative is a product in float32, and most of a block is
#: experts, not padding: oneDNN multiplies many rows in bfloat16 as fast, and faster with AMX.
_FEW_ROWS = 128
_MOST_GROUPS = 16  # scores of groups are in one vector
_LANES = 16
#: Every expert's score is in a register, or nearly.
_MOST_EXPERTS = 512


class Arrays(NamedTuple):
    """What a gate finds."""

    logits: npt.NDArray[np.float32]  # [T, E]
    expert_ids: npt.NDArray[np.int32]  # [T, k]
    weights: npt.NDArray[np.float32]  # [T, k]


class Avx512Gate:
    """The gate of one layer. Any number of threads may use it at the same time."""

    def __init__(self, weight: torch.Tensor, spec: GateSpec) -> None:
        """`weight` [E, H] is of numbers that bfloat16 has. See `create_avx512_gate`."""
        self._spec = spec
        self._experts = len(weight)
        self._outputs = -(-len(weight) // BLOCK) * BLOCK
        padded = torch.zeros(self._outputs, weight.shape[1], dtype=torch.bfloat16, device="cpu")
        padded[: len(weight)] = weight
        self._blocks = pack_blocks(padded)
        self._code = _compile(spec, self._experts)
        self._takes_many = spec.logits_float32 and 2 * self._experts >= BLOCK

    def takes(self, hidden_TH: torch.Tensor) -> bool:
        """Whether it can route such rows."""
        if hidden_TH.dtype != torch.bfloat16 or hidden_TH.stride(1) != 1:
            return False
        return hidden_TH.shape[0] <= _FEW_ROWS or self._takes_many

    def route(
        self, hidden_TH: torch.Tensor, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, Routing]:
        """Logits [T, E] float32, and what they choose under the bias; see `gating.select`."""
        logits, ids, weights = map(torch.from_numpy, self.arrays(hidden_TH, bias_E))
        return logits, Routing(ids, weights)

    def arrays(self, hidden_TH: torch.Tensor, bias_E: torch.Tensor | None) -> Arrays:
        """The same without torch, whose calls cost more than few rows do."""
        rows, outputs, groups = hidden_TH.shape[0], self._outputs, self._blocks.shape[1]
        bias = self._padded(bias_E)
        ids_at = rows * outputs
        weights_at = ids_at + rows * self._spec.top_k
        results = torch.empty(
            weights_at + rows * self._spec.top_k, dtype=torch.float32, device="cpu"
        )
        x, stride = hidden_TH.data_ptr(), hidden_TH.stride(0)
        matrix, at = self._blocks.data_ptr(), results.data_ptr()
        places = bias.data_ptr(), at, at + 4 * ids_at, at + 4 * weights_at

        code = self._code

        def route(start: int, stop: int) -> None:
            code.route(start, stop, x, stride, code.rows.data_ptr(), matrix, groups, *places)

        threads = 1
        if rows >= 2 * _THREAD_ROWS:
            threads = max(1, min(torch.get_num_threads(), rows // _THREAD_ROWS))
        bounds = [rows * part // threads for part in range(threads + 1)]
        others = [_threads().submit(route, *bounds[part : part + 2]) for part in range(1, threads)]
        route(0, bounds[1])
        for other in others:
            other.result()
        found, shape = results.numpy(), (rows, self._spec.top_k)
        return Arrays(
            found[:ids_at].reshape(rows, outputs)[:, : self._experts],
            found[ids_at:weights_at].view(np.int32).reshape(shape),
            found[weights_at:].reshape(shape),
        )

    def _padded(self, bias_E: torch.Tensor | None) -> torch.Tensor:
        """The bias of as many experts as the blocks have room for."""
        if bias_E is not None and bias_E.shape[0] == self._outputs:
            return bias_E.contiguous()
        bias = torch.zeros(self._outputs, dtype=torch.float32, device="cpu")
        if bias_E is not None:
            bias[: self._experts] = bias_E
        return bias


def create_avx512_gate(gate: GateWeights, spec: GateSpec) -> Avx512Gate | None:
    """The gate of one layer; None where `expertmesh.gating` has to do, because the CPU has no
    AVX-512 BF16, llvmlite is not installed, or the model is not for it: weights that bfloat16 does
    not have, or groups that are no whole vectors."""
    experts, hidden = gate.weight.shape
    groups = spec.n_group if spec.topk_group < spec.n_group else 1
    fits = hidden % 2 == 0 and experts <= _MOST_EXPERTS and groups <= _MOST_GROUPS
    if groups > 1 and experts // groups % _LANES:
        fits = False
    if not (fits and has_dot() and has_compiler()):
        return None
    weight = gate.weight.bfloat16()
    return Avx512Gate(weight, spec) if torch.equal(weight.float(), gate.weight.float()) else None


class _Code(NamedTuple):
    """The compiled function, what keeps it, and the numbers of rows that it asks for."""

    library: Library
    route: Callable[..., None]
    rows: torch.Tensor


@functools.cache
def _compile(spec: GateSpec, experts: int) -> _Code:
    """Once a process and kind of layer."""
    # Here, so that nobody who does without needs llvmlite.
    from router_service.kernels.avx512_gate_ir import PIECE, generate

    library = Library(generate(spec, experts))
    return _Code(
        library, library.function("route", "iipippipppp"), torch.arange(PIECE, device="cpu")
    )


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="gate")
