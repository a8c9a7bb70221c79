"""Expert servers as processes on one GPU, asked over gRPC, against the slow reference. No Ray.

    python scripts/expert_server_end_to_end.py [--json FILE] [--rehearse [--quick]]

Two shards of the example model share the GPU, in each dtype; then a tiny FP8 checkpoint is served
from FP8 and dequantised. Every layer is asked with batches that meet a full, a partly filled and no
recorded bucket. Exits with 1 where an answer is wrong or a server does not start.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import torch

from benchmarks.services import service
from expert_service.kernels.reference import swiglu
from expertmesh.checkpoint import Checkpoint
from expertmesh.codec.messages import (
    EXECUTE_REQUEST,
    EXECUTE_RESPONSE,
    ExecuteRequest,
    decode_whole,
    encode_whole,
)
from expertmesh.model import ExpertWeights, Slot
from expertmesh.placement import group_by_layer, initial_parts
from expertmesh.v1 import expert_pb2, expert_pb2_grpc

EXAMPLE = Path(__file__).parents[1] / "examples/tiny_deepseek"
ROWS = (1, 3, 64, 200, 700)  # buckets of 1, 4, 64 and 256 rows, and none
DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2, "fp8-w8a8": 6e-2}
_READY_S = 120.0
_ASK_S = 60.0
_MAX_BYTES = 1 << 30
_DIRECT = [("grpc.enable_http_proxy", 0)]  # the servers are on this machine


@dataclass(frozen=True, slots=True)
class Case:
    """One way to serve one checkpoint."""

    name: str
    checkpoint: Path
    dtype: str
    weights: str = "auto"
    shards: int = 1

    @property
    def tolerance(self) -> float:
        """Of an answer's error, relative to its norm."""
        return TOLERANCE.get(self.weights, TOLERANCE[self.dtype])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case gave: its largest error, or why there is none."""

    case: str
    answers: int
    error: float
    tolerance: float
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Whether every answer came and was within its tolerance."""
        return not self.failure and self.error <= self.tolerance


def _cases(fp8: Path, rehearse: bool, quick: bool) -> list[Case]:
    if rehearse:  # bfloat16 is silently wrong under the interpreter
        cases = [Case("example float32", EXAMPLE, "float32", shards=2)]
        cases += [Case(f"fp8 {w}", fp8, "float32", w) for w in ("fp8-w8a16", "fp8-w8a8")]
        return cases[:1] if quick else cases
    cases = [
        Case(f"example {d}", EXAMPLE, d, shards=2) for d in TOLERANCE if not d.startswith("fp8")
    ]
    modes = ("fp8-w8a16", "fp8-w8a8", "dequantised")
    return cases + [Case(f"fp8 {mode}", fp8, "bfloat16", mode) for mode in modes]


def _run(case: Case, device: str, rows: Sequence[int]) -> Outcome:
    """Starts the case's servers, asks each for every layer it holds, and stops them."""
    errors: list[float] = []
    try:
        with Checkpoint.open(case.checkpoint) as checkpoint, tempfile.TemporaryDirectory() as logs:
            parts = initial_parts(checkpoint.spec, case.shards)
            with _servers(case, device, Path(logs)) as addresses:
                for part, address in zip(parts, addresses, strict=True):
                    errors += _ask_shard(checkpoint, part, address, case.dtype, rows)
    except Exception as error:  # a step of a visit reports, and the next one runs
        return Outcome(case.name, len(errors), 0.0, case.tolerance, f"{error}"[-800:])
    return Outcome(case.name, len(errors), max(errors), case.tolerance)


@contextmanager
def _servers(case: Case, device: str, logs: Path) -> Iterator[list[str]]:
    """All shards at once, on one device; yields their addresses when all are ready."""
    with ExitStack() as stack:
        addresses = []
        for index in range(case.shards):
            command = (
                *("-m", "expert_service", str(case.checkpoint)),
                *("--shard", f"{index}/{case.shards}", "--backend", "triton", "--device", device),
                *("--dtype", case.dtype, "--weights", case.weights),
            )
            addresses.append(stack.enter_context(service(logs, *command)))
        for address in addresses:
            _wait_ready(address, logs / "services.log")
        yield addresses


def _wait_ready(address: str, log: Path) -> None:
    end = time.monotonic() + _READY_S
    with grpc.insecure_channel(address, options=_DIRECT) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        while time.monotonic() < end:
            try:
                if stub.DescribeShard(expert_pb2.DescribeShardRequest(), timeout=10.0).ready:
                    return
            except grpc.RpcError:
                break  # it listened once: it has ended
            time.sleep(0.1)
    raise RuntimeError(f"a server did not become ready:\n{log.read_text()}")


def _ask_shard(
    checkpoint: Checkpoint, part: Sequence[Slot], address: str, dtype: str, rows: Sequence[int]
) -> Iterator[float]:
    """The error of each answer of one server."""
    weights = {slot: checkpoint.read_expert(slot, getattr(torch, dtype)) for slot in part}
    options = [*_DIRECT, ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        ask = channel.unary_unary("/expertmesh.v1.ExpertService/Execute")
        for layer, experts in group_by_layer(part).items():
            spec = checkpoint.spec.layer(layer)
            assert spec is not None
            for count in rows:
                request = _request(layer, experts, spec.top_k + spec.has_shared, count,
                                   checkpoint.spec.hidden_size, dtype)  # fmt: skip
                answer = ask(encode_whole(EXECUTE_REQUEST, request), timeout=_ASK_S)
                found = decode_whole(EXECUTE_RESPONSE, answer, _MAX_BYTES).hidden_states
                yield _relative_error(found, _expected(request, weights))


def _expected(request: ExecuteRequest, weights: Mapping[Slot, ExpertWeights]) -> torch.Tensor:
    """What the reference gives, expert by expert: pair by pair takes longer than the server."""
    out = torch.zeros(request.hidden_states.shape)
    ids, asked = map(torch.from_numpy, (request.expert_ids, request.expert_weights))
    for expert in ids.unique().tolist():
        if expert >= 0:
            rows, columns = (ids == expert).nonzero(as_tuple=True)
            y = swiglu(request.hidden_states[rows], weights[Slot(request.layer, expert)])
            out.index_add_(0, rows, asked[rows, columns, None] * y)
    return out.to(request.hidden_states.dtype)


def _request(
    layer: int, experts: Sequence[int], k: int, rows: int, hidden_size: int, dtype: str
) -> ExecuteRequest:
    """Rows that ask for up to `k` of the experts that are there."""
    generator = torch.Generator().manual_seed(1000 * layer + rows)
    k = min(k, len(experts))
    order = torch.rand(rows, len(experts), generator=generator).argsort(1)[:, :k]
    ids = torch.tensor(list(experts), dtype=torch.int32)[order]
    ids[1:][torch.rand(rows - 1, k, generator=generator) < 0.2] = -1
    hidden = torch.randn(rows, hidden_size, generator=generator).to(getattr(torch, dtype))
    weights = torch.rand(rows, k, generator=generator)
    return ExecuteRequest(
        layer=layer,
        hidden_states=hidden,
        expert_ids=ids.numpy(),
        expert_weights=weights.numpy(),
    )


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")  # NaN is wrong, and would hide in a maximum


def _make_fp8(folder: Path) -> None:
    from tests.checkpoints import make_fp8_checkpoint  # it needs transformers

    make_fp8_checkpoint(folder, num_hidden_layers=2)


def main() -> int:
    """Runs every case. The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="writes the outcomes there")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, interpreted, tiny")
    parser.add_argument("--quick", action="store_true", help="one case, two batches a layer")
    arguments = parser.parse_args()
    device = "cpu" if arguments.rehearse else "cuda"
    rows = (1, 3) if arguments.quick else (1, 3, 20) if arguments.rehearse else ROWS
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.quick:
            _make_fp8(Path(folder))
        outcomes = []
        for case in _cases(Path(folder), arguments.rehearse, arguments.quick):
            outcomes.append(_run(case, device, rows))
            last = outcomes[-1]
            said = last.failure or f"{last.answers} answers, error {last.error:.1e}"
            print(f"{'ok' if last.is_right else 'WRONG'} {last.case}: {said}", flush=True)
    if arguments.json:
        whole = [{**asdict(outcome), "is_right": outcome.is_right} for outcome in outcomes]
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0 if all(outcome.is_right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
