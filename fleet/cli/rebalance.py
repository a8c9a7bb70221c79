"""`expertmesh rebalance`: whether experts move by themselves, and what that has come to."""

from __future__ import annotations

import argparse
import json

from expertmesh.v1 import control_pb2 as pb
from fleet import control
from fleet.cli.output import emit
from fleet.cli.status import router_address

NAME = "rebalance"
HELP = "Let experts move between servers by themselves, stop that, or show what was decided."
EXAMPLES = """\
  expertmesh rebalance           # whether they may, what was decided last and why
  expertmesh rebalance on        # from now on, with the settings the cluster was started with
  expertmesh rebalance off       # no more; a migration under way goes on to its end

`expertmesh plan` shows the moves themselves, and makes them once with --apply.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("setting", nargs="?", choices=("on", "off"), help="what to set")
    parser.add_argument("--router", default="", help="host:port of a router")
    parser.add_argument("--controller", default="", help="host:port of the load controller")


def run(arguments: argparse.Namespace) -> int:
    """0: set, or shown."""
    controller = control.address_of(arguments.controller, lambda: router_address(arguments.router))
    if arguments.setting:
        control.set_rebalancing(controller, enabled=arguments.setting == "on")
    report = control.get_fleet(controller).rebalance
    if arguments.json:
        emit(json.dumps(_as_json(controller, report)))
    else:
        emit("\n".join(_lines(report)))
    return 0


def _as_json(controller: str, report: pb.RebalanceReport) -> dict[str, object]:
    return {
        "controller": controller,
        "enabled": report.enabled,
        "reason": report.reason,
        "age_s": report.age_s if report.age_s >= 0 else None,
        "done": report.done,
        "failed": report.failed,
        "loaded": report.loaded,
        "layers": [
            {"layer": each.layer, "maxvio": each.max_violation, "planned": each.planned}
            for each in report.layers
        ],
    }


def _lines(report: pb.RebalanceReport) -> list[str]:
    ago = f", {report.age_s:.0f} s ago" if report.age_s >= 0 else ""
    return [
        f"rebalancing  {'on' if report.enabled else 'off'}",
        f"decided      {report.reason}{ago}",
        f"so far       {report.done} migrations, {report.failed} failed, {report.loaded} slots "
        "loaded",
    ]
