"""What a router says of itself in numbers; docs/operations.md lists them for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from expertmesh.model import SERVER_STATES
from expertmesh.rpc.admission import Admission
from expertmesh.telemetry.metric import Metric, Reading, by_label
from router_service.controller_link import ControllerLink
from router_service.router import Router

REQUESTS = Metric(
    "expertmesh_router_requests_total",
    "counter",
    "Requests that ended, by how: OK, or the reason of the error",
    ("outcome",),
)
SECONDS = Metric(
    "expertmesh_router_request_seconds",
    "histogram",
    "Time in the router of requests that were answered, by kind of layer",
    ("kind",),
)
ROWS = Metric("expertmesh_router_rows_total", "counter", "Rows answered")
QUEUED = Metric("expertmesh_router_queue_requests", "gauge", "Requests that wait to join a batch")
BATCHES = Metric("expertmesh_router_batches", "gauge", "Batches under way")
INFLIGHT = Metric(
    "expertmesh_router_inflight_requests", "gauge", "Requests admitted and not yet answered"
)
INFLIGHT_BYTES = Metric(
    "expertmesh_router_inflight_bytes", "gauge", "Bytes of hidden states of those requests"
)
RETRIED = Metric(
    "expertmesh_router_retried_pairs_total",
    "counter",
    "Pairs of row and expert, in answers, that had to be sent again",
)
HEDGES = Metric(
    "expertmesh_router_hedges_total",
    "counter",
    "Parts of batches asked of a replica too, because their server was slow or silent",
)
BIAS_VERSION = Metric(
    "expertmesh_router_bias_version", "gauge", "Version of the biases that new batches take"
)
EPOCH = Metric("expertmesh_router_epoch", "gauge", "Version of the placement that new batches take")
CONTROLLER = Metric(
    "expertmesh_router_controller_connected", "gauge", "1 while the load controller is heard"
)
READY = Metric("expertmesh_router_ready", "gauge", "1 while every expert can be asked")
UNSERVED = Metric(
    "expertmesh_router_experts_without_server",
    "gauge",
    "Experts, over all layers, that no connected server holds",
)
SERVERS = Metric(
    "expertmesh_router_servers", "gauge", "Announced expert servers, by state", ("state",)
)
CONNECTED = Metric(
    "expertmesh_router_server_connected",
    "gauge",
    "1 while this router has a connection to the server",
    ("server",),
)
SERVER_INFLIGHT = Metric(
    "expertmesh_router_server_inflight_requests",
    "gauge",
    "Requests sent to the server and not yet answered",
    ("server",),
)
LOOP_FAILURES = Metric(
    "expertmesh_router_loop_failures_total",
    "counter",
    "Times that a loop of the router was ended by an error and started again",
    ("loop",),
)
SERVER_SUSPECTED = Metric(
    "expertmesh_router_server_suspected",
    "gauge",
    "1 while the server is left out, because it was silent where a replica answered",
    ("server",),
)
SERVER_SHARED = Metric(
    "expertmesh_router_server_shared_memory",
    "gauge",
    "1 while hidden states go to the server through shared memory",
    ("server",),
)
SHARED_STREAMS = Metric(
    "expertmesh_router_shared_streams",
    "gauge",
    "Open streams of clients that share memory with this router",
)


def read(
    router: Router, link: ControllerLink, admission: Admission, loop_failures: Mapping[str, int]
) -> Iterator[Reading]:
    """Every number, now."""
    yield from by_label(LOOP_FAILURES, loop_failures)
    for outcome, count in admission.outcomes.items():
        yield REQUESTS.of(count, outcome)
    for kind, seconds in router.request_seconds.items():
        yield SECONDS.of(seconds, kind)
    yield ROWS.of(router.counts.answered_rows)
    yield QUEUED.of(sum(queue.waiting for queue in router.queues))
    yield BATCHES.of(sum(queue.running for queue in router.queues))
    yield INFLIGHT.of(admission.frames)
    yield INFLIGHT_BYTES.of(admission.bytes)
    yield RETRIED.of(router.counts.retried_pairs)
    yield HEDGES.of(router.hedges)
    yield BIAS_VERSION.of(router.snapshot.bias_version)
    yield EPOCH.of(router.snapshot.slots.epoch)
    yield CONTROLLER.of(link.connected)
    yield READY.of(not router.missing())
    yield UNSERVED.of(router.experts_without_server())
    yield from _servers(router)
    yield SHARED_STREAMS.of(admission.shared_streams)


def _servers(router: Router) -> Iterator[Reading]:
    links = router.pool.links()
    states = [link.announced.state for _, link in links]
    for state in SERVER_STATES:
        yield SERVERS.of(states.count(state), state)
    for server_id, link in links:
        yield CONNECTED.of(link.connected, server_id)
        yield SERVER_INFLIGHT.of(link.in_flight, server_id)
        yield SERVER_SUSPECTED.of(link.standing.suspected, server_id)
        yield SERVER_SHARED.of(link.transport == "shm", server_id)
