"""What an expert server says of itself in numbers; docs/operations.md lists them for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from expert_service.runner import DeviceRunner
from expert_service.shard import ExpertShard
from expertmesh.model import SERVER_STATES
from expertmesh.rpc.admission import Admission
from expertmesh.telemetry.metric import Metric, Reading, by_label, one_of
from expertmesh.v1 import router_pb2

INFO = Metric(
    "expertmesh_expert_info", "gauge", "Always 1: who this server is", ("server", "backend")
)
STATE = Metric(
    "expertmesh_expert_state", "gauge", "1 for the state that the server is in", ("state",)
)
REQUESTS = Metric(
    "expertmesh_expert_requests_total",
    "counter",
    "Requests that ended, by how: OK, or the reason of the error",
    ("outcome",),
)
QUEUE_SECONDS = Metric(
    "expertmesh_expert_queue_seconds", "histogram", "Time that computed requests had waited"
)
COMPUTE_SECONDS = Metric(
    "expertmesh_expert_compute_seconds", "histogram", "Time that the device took for a request"
)
ROWS = Metric("expertmesh_expert_rows_total", "counter", "Rows computed")
EXECUTIONS = Metric(
    "expertmesh_expert_executions_total",
    "counter",
    "Pairs of row and expert computed, shared ones, retries and hedges included",
    ("layer",),
)
QUEUED = Metric(
    "expertmesh_expert_queue_requests", "gauge", "Requests that wait for the device or are on it"
)
INFLIGHT = Metric(
    "expertmesh_expert_inflight_requests", "gauge", "Requests admitted and not yet answered"
)
INFLIGHT_BYTES = Metric(
    "expertmesh_expert_inflight_bytes", "gauge", "Bytes of hidden states of those requests"
)
SLOTS = Metric("expertmesh_expert_slots", "gauge", "Experts, over all layers, loaded now")
LOADED_BYTES = Metric(
    "expertmesh_expert_loaded_bytes", "gauge", "Bytes of the checkpoint's weights loaded so far"
)
PLANNED_BYTES = Metric(
    "expertmesh_expert_planned_bytes", "gauge", "Bytes of the weights that it is to load in all"
)
LOOP_FAILURES = Metric(
    "expertmesh_expert_loop_failures_total",
    "counter",
    "Times that a loop of the expert server was ended by an error and started again",
    ("loop",),
)


def read(
    status: router_pb2.ServerStatus,
    shard: ExpertShard,
    runner: DeviceRunner,
    admission: Admission,
    loop_failures: Mapping[str, int],
) -> Iterator[Reading]:
    """Every number, now."""
    yield from by_label(LOOP_FAILURES, loop_failures)
    yield INFO.of(1, status.server_id, status.backend)
    yield from one_of(STATE, SERVER_STATES, status.state)
    for outcome, count in admission.outcomes.items():
        yield REQUESTS.of(count, outcome)
    yield QUEUE_SECONDS.of(runner.queue_seconds)
    yield COMPUTE_SECONDS.of(runner.compute_seconds)
    yield ROWS.of(runner.rows)
    for layer, counts in shard.execution_counts().items():
        yield EXECUTIONS.of(int(counts.sum()), str(layer))
    yield QUEUED.of(runner.queued)
    yield INFLIGHT.of(admission.frames)
    yield INFLIGHT_BYTES.of(admission.bytes)
    yield SLOTS.of(len(shard.slots))
    yield LOADED_BYTES.of(status.loaded_bytes)
    yield PLANNED_BYTES.of(status.total_bytes)
