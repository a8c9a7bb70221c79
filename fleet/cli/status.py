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
                    "model_type": info.model_type,
                    "hidden_size": info.hidden_size,
                    "layers": len(info.layers),
                    "balance_mode": seen.balance_mode,
                    "bias_version": seen.bias_version,
                    "epoch": seen.epoch,
                    "controller": seen.controller,
                    "controller_connected": seen.controller_connected,
                    "answered_requests": seen.answered_requests,
                    "retried_pairs": seen.retried_pairs,
                    "servers": [server_json(server) for server in seen.servers],
                }
            )
        )
    else:
        emit("\n".join(_lines(address, seen, info.model_type, len(info.layers))))
    return 0 if seen.ready else NOT_READY


def _lines(
    address: str, seen: router_pb2.GetStatusResponse, model_type: str, layers: int
) -> list[str]:
    ready = "ready" if seen.ready else f"not ready: {seen.reason}"
    controller = "connected" if seen.controller_connected else "away"
    lines = [
        f"router      {address}  {ready}",
        f"model       {model_type}, {layers} feed-forward layers",
        f"controller  {seen.controller}  {controller}, balance {seen.balance_mode}, "
        f"bias version {seen.bias_version}, epoch {seen.epoch}",
        f"answered    {seen.answered_requests} requests, {seen.retried_pairs} pairs sent again",
        "",
        f"{'server':<18} {'state':<9} {'slots':>6} {'loaded':>10}  {'backend':<14} "
        f"{'pid':>7}  endpoint",
    ]
    for server in seen.servers:
        connected = server.state if server.connected else f"{server.state}*"
        lines.append(
            f"{server.server_id:<18} {connected:<9} {server.slots:>6} "
            f"{server.loaded_bytes / 1e6:>7.1f} MB  {server.backend:<14} {server.pid:>7}  "
            f"{server.endpoint}"
        )
        if server.error:
            lines.append(f"    {server.error}")
    if any(not server.connected for server in seen.servers):
        lines.append("* the router has no connection to it now")
    return lines
