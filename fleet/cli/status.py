"""`expertmesh status`: one router's view of its cluster."""

from __future__ import annotations

import argparse
import json

from expertmesh.client import connect
from expertmesh.errors import ConfigError
from expertmesh.v1 import router_pb2
from fleet import state
from fleet.cli.output import emit, server_json

NAME = "status"
HELP = "Show a cluster: servers, versions, whether every expert can be asked."
EXAMPLES = """\
  expertmesh status                            # the last cluster started on this host
  expertmesh status --router 10.0.0.7:50051 --json
"""
NOT_READY = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--router", default="", help="host:port of a router")


def router_address(given: str) -> str:
    """The router to ask: the one given, or the last cluster's. Raises ConfigError."""
    if given:
        return given
    last = state.recall()
    if last is None:
        raise ConfigError(
            "no cluster was started on this host: start one with `expertmesh serve CHECKPOINT`, "
            "or name a router with --router HOST:PORT"
        )
    return last.address


def run(arguments: argparse.Namespace) -> int:
    """0 when the cluster is ready, 3 when it is not."""
    address = router_address(arguments.router)
    with connect(address, timeout=5.0) as mesh:
        seen, info = mesh.status(), mesh.describe()
    if arguments.json:
        emit(
            json.dumps(
                {
                    "address": address,
                    "ready": seen.ready,
                    "reason": seen.reason,
                    "problem": seen.problem,
                    "model_type": info.model_type,
                    "hidden_size": info.hidden_size,
                    "layers": len(info.layers),
                    "balance_mode": seen.balance_mode,
                    "bias_version": seen.bias_version,
                    "epoch": seen.epoch,
                    "controller": seen.controller,
                    "controller_connected": seen.controller_connected,
                    "controller_age_s": seen.controller_age_s,
                    "balance_alive": seen.balance_alive,
                    "window_age_s": seen.window_age_s,
                    "divergence": seen.divergence,
                    "answered_requests": seen.answered_requests,
                    "retried_pairs": seen.retried_pairs,
                    "servers": [server_json(server) for server in seen.servers],
                }
            )
        )
    else:
        emit("\n".join(_lines(address, seen, info.model_type, len(info.layers))))
    return 0 if seen.ready else NOT_READY


def _alive(seen: router_pb2.GetStatusResponse) -> str:
    if seen.controller_age_s < 0:
        return "NOT ALIVE: the load controller was never heard"
    if not seen.balance_alive:
        return f"NOT ALIVE: last heard {seen.controller_age_s:.0f} s ago, biases stand still"
    return "alive" if seen.window_age_s < 0 else f"alive, last window {seen.window_age_s:.1f} s ago"


def _lines(
    address: str, seen: router_pb2.GetStatusResponse, model_type: str, layers: int
) -> list[str]:
    ready = "ready" if seen.ready else f"not ready: {seen.reason}"
    controller = "connected" if seen.controller_connected else "away"
    lines = [
        f"router      {address}  {ready}",
        f"model       {model_type}, {layers} feed-forward layers",
        f"controller  {seen.controller}  {controller}, bias version {seen.bias_version}, "
        f"epoch {seen.epoch}",
        f"balance     {seen.balance_mode}, {_alive(seen)}, divergence {seen.divergence:.2%}",
        f"answered    {seen.answered_requests} requests, {seen.retried_pairs} pairs sent again",
        *([f"problem     {seen.problem}"] if seen.problem else []),
        "",
        f"{'server':<18} {'state':<9} {'slots':>6} {'loaded':>10}  {'backend':<14} {'rate':>5} "
        f"{'pid':>7}  {'by':<4} endpoint",
    ]
    for server in seen.servers:
        connected = server.state if server.connected else f"{server.state}*"
        lines.append(
            f"{server.server_id:<18} {connected:<9} {server.slots:>6} "
            f"{server.loaded_bytes / 1e6:>7.1f} MB  {server.backend:<14} "
            f"{server.rate or 1.0:>5.2g} {server.pid:>7}  {server.transport:<4} {server.endpoint}"
        )
        if server.suspected:
            lines.append("    left out: it was silent where a replica answered")
        if server.error:
            lines.append(f"    {server.error}")
    if any(not server.connected for server in seen.servers):
        lines.append("* the router has no connection to it now")
    return lines
