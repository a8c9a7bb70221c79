"""`expertmesh balance`: the kill switch of online balancing, and its opposite."""

from __future__ import annotations

import argparse
import json

from expertmesh.client import connect
from expertmesh.v1 import control_pb2
from fleet import control
from fleet.cli.output import emit
from fleet.cli.status import router_address

NAME = "balance"
HELP = "Freeze, adapt or reset the expert biases of a running cluster."
EXAMPLES = """\
  expertmesh balance freeze              # the checkpoint's own routing, on every router, now
  expertmesh balance adapt               # biases follow the load, within the cluster's bounds
  expertmesh balance reset               # start again from the trained bias; the mode stays
  expertmesh balance freeze --controller 10.0.0.7:40317 --json    # when no router answers
"""
UNCONFIRMED = 3
#: What each action asks of the controller: mode, and whether deltas start from zero.
_ACTIONS = {"freeze": ("frozen", False), "adapt": ("adaptive", False), "reset": ("", True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("action", choices=_ACTIONS, help="what to do")
    parser.add_argument("--router", default="", help="host:port of a router")
    parser.add_argument("--controller", default="", help="host:port of the load controller")
    parser.add_argument(
        "--wait-s", type=float, default=5.0, help="how long to wait for every router to say so (5)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when every router uses the new version, 3 when one has not said so in time."""
    mode, reset = _ACTIONS[arguments.action]
    controller = arguments.controller or _controller_of(router_address(arguments.router))
    version = control.set_balance_mode(controller, mode, reset=reset)
    load = control.wait_in_use(controller, version, arguments.wait_s)
    behind = [router for router in load.routers if router.bias_version < version]
    if arguments.json:
        emit(json.dumps(_as_json(controller, version, load)))
    else:
        emit("\n".join(_lines(version, load, behind)))
    return UNCONFIRMED if behind else 0


def _controller_of(router: str) -> str:
    with connect(router, timeout=5.0) as mesh:
        return mesh.status().controller


def _as_json(
    controller: str, version: int, load: control_pb2.GetClusterLoadResponse
) -> dict[str, object]:
    return {
        "controller": controller,
        "balance_mode": load.balance_mode,
        "bias_version": version,
        "in_use": all(router.bias_version >= version for router in load.routers),
        "routers": [
            {
                "router_id": router.router_id,
                "endpoint": router.endpoint,
                "bias_version": router.bias_version,
                "away_s": router.away_s if router.away_s >= 0 else None,
            }
            for router in load.routers
        ],
    }


def _lines(
    version: int,
    load: control_pb2.GetClusterLoadResponse,
    behind: list[control_pb2.RouterState],
) -> list[str]:
    total = len(load.routers)
    lines = [
        f"balance {load.balance_mode}, bias version {version}, in use by {total - len(behind)} of "
        f"{total} routers"
    ]
    lines += [f"  {router.router_id} at {router.endpoint} {_state(router)}" for router in behind]
    return lines


def _state(router: control_pb2.RouterState) -> str:
    if router.away_s < 0:
        return f"has not said that it does: version {router.bias_version}"
    return (
        f"is cut off or dead for {router.away_s:.0f} s: if it serves, then by version "
        f"{router.bias_version}; end it"
    )
