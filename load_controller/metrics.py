"""What the load controller says in numbers; docs/operations.md lists them for people.

Per-layer scalars at most: the layer × expert matrix is what the RPC GetClusterLoad is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from expertmesh.config import BalanceMode
from expertmesh.model import SERVER_STATES
from expertmesh.telemetry.metric import Metric, Reading, one_of
from expertmesh.v1 import control_pb2 as pb
from load_controller.controller import LoadController

ALIVE_WITHIN_S = 5.0  # the loop turns ten times a second: fifty turns in a row are missing

WINDOWS = Metric(
    "expertmesh_controller_windows_closed_total", "counter", "Windows closed, over all layers"
)
WINDOW_MAXVIO = Metric(
    "expertmesh_controller_window_maxvio",
    "gauge",
    "MaxVio of the layer's last closed window: router-gated assignments only",
    ("layer",),
)
MAXVIO = Metric(
    "expertmesh_controller_maxvio",
    "gauge",
    "MaxVio of all the layer's assignments ever counted",
    ("layer",),
)
ASSIGNED = Metric(
    "expertmesh_controller_assignments_total",
    "counter",
    "Pairs of row and expert in answers, whoever gated them",
    ("layer",),
)
EXECUTED = Metric(
    "expertmesh_controller_executions_total",
    "counter",
    "Pairs of row and expert that servers computed, shared ones, retries and hedges included",
    ("layer",),
)
BIAS_VERSION = Metric(
    "expertmesh_controller_bias_version", "gauge", "Version of the biases last published"
)
DELTA_MAX = Metric(
    "expertmesh_controller_bias_delta_max",
    "gauge",
    "Largest distance of a serving bias from its trained one, over all layers",
)
MODE = Metric(
    "expertmesh_controller_balance_mode", "gauge", "1 for the mode that is in force", ("mode",)
)
EPOCH = Metric("expertmesh_controller_epoch", "gauge", "Version of the placement last published")
AGE = Metric(
    "expertmesh_controller_balancing_age_seconds",
    "gauge",
    "Since the balancing loop last turned; it turns ten times a second",
)
ALIVE = Metric(
    "expertmesh_controller_balancing_alive",
    "gauge",
    "1 while the balancing loop turns, whether or not there is anything to balance",
)
PUSHES = Metric(
    "expertmesh_controller_pushes_total", "counter", "Messages sent to routers that watch"
)
REPORTS = Metric(
    "expertmesh_controller_reports_total", "counter", "Reports of counts with news", ("kind",)
)
DROPPED = Metric(
    "expertmesh_controller_reports_dropped_total",
    "counter",
    "Reports that came again or too late, and changed nothing",
    ("kind",),
)
ROUTERS = Metric("expertmesh_controller_routers", "gauge", "Routers that watch now")
SERVERS = Metric(
    "expertmesh_controller_servers",
    "gauge",
    "Expert servers that were ever announced, by state",
    ("state",),
)
SERVER_MAXVIO = Metric(
    "expertmesh_controller_server_maxvio",
    "gauge",
    "MaxVio over servers of the layer's average load, as last looked at for rebalancing",
    ("layer",),
)
REBALANCING = Metric(
    "expertmesh_controller_rebalancing", "gauge", "1 while experts may move by themselves"
)
REBALANCES = Metric(
    "expertmesh_controller_rebalances_total",
    "counter",
    "Migrations that rebalancing began",
    ("outcome",),
)
REBALANCED = Metric(
    "expertmesh_controller_rebalanced_slots_total", "counter", "Slots that rebalancing has loaded"
)
WANTED = Metric(
    "expertmesh_controller_servers_wanted",
    "gauge",
    "Expert servers that the supervisor wants; 0 where there is none",
)
STARTING = Metric(
    "expertmesh_controller_servers_starting",
    "gauge",
    "Expert servers that the supervisor has asked for and that do not answer yet",
)
SUPERVISED = Metric(
    "expertmesh_controller_supervised", "gauge", "1 while a supervisor holds the lease"
)
LOOP_FAILURES = Metric(
    "expertmesh_controller_loop_failures_total",
    "counter",
    "Times that a loop of the load controller was ended by an error and started again",
    ("loop",),
)
STORE_FAILURES = Metric(
    "expertmesh_controller_store_failures_total",
    "counter",
    "Times that the state file could not be written; each was tried again",
)
STORE_WRITABLE = Metric(
    "expertmesh_controller_store_writable", "gauge", "1 while the state file can be written"
)


def read(
    controller: LoadController,
    rebalancing: pb.RebalanceReport,
    pushes: int,
    now: float,
    age_s: float,
) -> Iterator[Reading]:
    """Every number at `now`; `age_s` is since the balancing loop last turned."""
    balancer = controller.balancer
    yield AGE.of(age_s)
    yield ALIVE.of(age_s < ALIVE_WITHIN_S)
    yield from one_of(MODE, get_args(BalanceMode), balancer.mode)
    yield BIAS_VERSION.of(controller.bias_version)
    deltas = (float(state.delta.abs().max()) for state in balancer.layers.values())
    yield DELTA_MAX.of(max(deltas, default=0.0))
    yield EPOCH.of(controller.epoch)
    yield PUSHES.of(pushes)
    yield ROUTERS.of(controller.routers)
    states = controller.server_states()
    for state in SERVER_STATES:
        yield SERVERS.of(states.count(state), state)
    for kind, count in controller.accounts.reports_taken.items():
        yield REPORTS.of(count, kind)
    for kind, count in controller.accounts.reports_dropped.items():
        yield DROPPED.of(count, kind)
    yield WINDOWS.of(balancer.closed_windows)
    yield from _layers(controller)
    yield from _rebalancing(rebalancing)
    scaling = controller.scaling
    supervised = bool(scaling.holder(now))
    yield SUPERVISED.of(supervised)
    yield WANTED.of(scaling.report.replicas if supervised else 0)
    yield STARTING.of(scaling.report.starting if supervised else 0)


def _rebalancing(report: pb.RebalanceReport) -> Iterator[Reading]:
    yield REBALANCING.of(report.enabled)
    yield REBALANCES.of(report.done, "done")
    yield REBALANCES.of(report.failed, "failed")
    yield REBALANCED.of(report.loaded)
    for entry in report.layers:
        yield SERVER_MAXVIO.of(entry.max_violation, str(entry.layer))


def _layers(controller: LoadController) -> Iterator[Reading]:
    for layer, state in sorted(controller.balancer.layers.items()):
        yield WINDOW_MAXVIO.of(state.violation, str(layer))
    for load in controller.accounts.layer_loads():
        yield MAXVIO.of(load.max_violation, str(load.layer))
        yield ASSIGNED.of(sum(load.counts) + sum(load.caller_gated_counts), str(load.layer))
    for entry in controller.accounts.layer_executions():
        yield EXECUTED.of(sum(entry.counts), str(entry.layer))
