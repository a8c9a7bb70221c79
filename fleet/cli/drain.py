"""`expertmesh drain`: take one expert server out; its experts move away first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from expertmesh.client import connect
from expertmesh.codec.slots import slots_of
from expertmesh.errors import InvalidRequestError
from expertmesh.model import Slot
from expertmesh.v1 import control_pb2 as pb
from fleet import control
from fleet.cli.output import emit
from fleet.cli.status import router_address
from fleet.moves_away import Room, moves_away
from load_controller.planner import Move

NAME = "drain"
HELP = "Take one expert server out of a cluster, while requests go on."
EXAMPLES = """\
  expertmesh drain shard1-replica0             # others get what only it holds, then it ends
  expertmesh drain auto-3 --dry-run            # only say what would move
  expertmesh drain auto-3 --router 10.0.0.7:50051 --json

Where the cluster was started with --autoscale, another server is asked for if the load, or
`expertmesh scale`, wants as many as before.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("server", help="its name, as `expertmesh status` shows it")
    parser.add_argument("--dry-run", action="store_true", help="say what would move, do nothing")
    parser.add_argument("--router", default="", help="host:port of a router")
    parser.add_argument("--controller", default="", help="host:port of the load controller")


def run(arguments: argparse.Namespace) -> int:
    """0 when the server takes no more requests. Raises NoRoomError where an expert would lose its
    last copy and nobody has room for it."""
    controller = control.address_of(arguments.controller, lambda: router_address(arguments.router))
    fleet = control.get_fleet(controller)
    counts = control.counts(controller)
    moves = plan(fleet, arguments.server, counts, _experts(arguments, counts))
    if not arguments.dry_run:
        control.begin_drain(controller, arguments.server, moves).result()
    loads = sum(move.action == "load" for move in moves)
    if arguments.json:
        said = {
            "server": arguments.server,
            "drained": not arguments.dry_run,
            "moves": [move._asdict() for move in moves],
        }
        emit(json.dumps(said))
    elif arguments.dry_run:
        emit(f"{arguments.server} would drain; others would load {loads} slots first")
    else:
        emit(f"{arguments.server} drains; others have loaded {loads} slots")
    return 0


def _experts(
    arguments: argparse.Namespace, counts: Mapping[int, control.LayerCounts]
) -> dict[int, int]:
    """Routed experts by layer; where only the controller is known, of layers that did something."""
    if arguments.controller:
        return {layer: len(of_layer) for layer, of_layer in counts.items()}
    with connect(router_address(arguments.router), timeout=5.0) as mesh:
        return {layer.index: layer.num_experts for layer in mesh.describe().layers}


def plan(
    fleet: pb.GetFleetResponse,
    server: str,
    counts: Mapping[int, control.LayerCounts],
    experts: Mapping[int, int],
) -> tuple[Move, ...]:
    """What has to move; nothing where the server is not ready. Raises InvalidRequestError,
    UnavailableError, NoRoomError."""
    states = {entry.server.server_id: entry.server.state for entry in fleet.servers}
    if server not in states:
        raise InvalidRequestError(
            f"there is no server {server!r}: name one of {', '.join(sorted(states))}"
        )
    if states[server] != "ready":
        return ()
    holds: dict[str, frozenset[Slot]] = {
        entry.server.server_id: frozenset(slots_of(entry.layers))
        for entry in fleet.servers
        if entry.server.state == "ready"
    }
    return moves_away(server, holds, counts, Room(experts, fleet.report.slots or None))
