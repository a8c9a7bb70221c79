"""`expertmesh scale`: how many expert servers there may be, by hand; or what there are."""

from __future__ import annotations

import argparse
import json
import time

from expertmesh.client import connect
from expertmesh.errors import ConfigError
from expertmesh.v1 import control_pb2 as pb
from fleet import control
from fleet.cli.output import emit
from fleet.cli.status import router_address

NAME = "scale"
HELP = "Show how many expert servers there are and should be; set their number or bounds by hand."
EXAMPLES = """\
  expertmesh scale                      # how many there are, how many are wanted, and why
  expertmesh scale 3                    # three, whatever the load
  expertmesh scale --min 2 --max 6      # between two and six, as the load asks for
  expertmesh scale --reset              # as the cluster was started
  expertmesh scale 3 --dry-run          # only say what would change
  expertmesh scale 3 --wait-s 300       # return when they answer

It needs a cluster that was started with --autoscale: its supervisor does the work.
"""
UNFINISHED = 3
_POLL_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("replicas", type=int, nargs="?", help="exactly so many servers")
    parser.add_argument("--min", type=int, help="at least so many servers")
    parser.add_argument("--max", type=int, help="at most so many servers")
    parser.add_argument("--reset", action="store_true", help="the bounds of the cluster's start")
    parser.add_argument("--dry-run", action="store_true", help="say what would be set, set nothing")
    parser.add_argument("--router", default="", help="host:port of a router")
    parser.add_argument("--controller", default="", help="host:port of the load controller")
    parser.add_argument(
        "--wait-s", type=float, default=0.0, help="how long to wait until it is so (0)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0: set, or shown; 3: not brought about within --wait-s."""
    wanted = _wanted(arguments)
    controller = control.address_of(arguments.controller, lambda: router_address(arguments.router))
    fleet = control.get_fleet(controller)
    if wanted is not None:
        if not fleet.lease_owner:
            raise ConfigError(
                "nobody adds or removes servers in this cluster: start it with --autoscale, as in "
                "`expertmesh serve CHECKPOINT --ray-address auto --cpus-per-server 8 --autoscale "
                "max_replicas=8`"
            )
        _check(wanted, fleet.report, _experts(arguments))
        if not arguments.dry_run:
            control.set_server_bounds(controller, *wanted)
            fleet = _wait(controller, arguments.wait_s, *wanted)
    done = _is_done(fleet, *(wanted or (0, 0)))
    if arguments.json:
        emit(json.dumps(_as_json(controller, fleet, wanted, arguments.dry_run, done)))
    else:
        emit("\n".join(_lines(fleet, wanted, arguments.dry_run)))
    waited = wanted is not None and not arguments.dry_run and arguments.wait_s > 0
    return UNFINISHED if waited and not done else 0


def _wanted(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """The bounds asked for, 0 for as configured; None where nothing was."""
    given = [arguments.replicas, arguments.min, arguments.max]
    if arguments.reset:
        if given != [None] * 3:
            raise ConfigError("--reset goes without a number, --min or --max")
        return 0, 0
    if given == [None] * 3:
        return None
    if any(number is not None and number < 1 for number in given):
        raise ConfigError("the number of servers, --min and --max must be at least 1")
    if arguments.replicas is not None:
        if given[1:] != [None] * 2:
            raise ConfigError("give either a number or --min and --max")
        return arguments.replicas, arguments.replicas
    least, most = arguments.min or 0, arguments.max or 0
    if least and most and most < least:
        raise ConfigError(f"--min {least} is more than --max {most}")
    return least, most


def _experts(arguments: argparse.Namespace) -> int:
    """Routed experts of the layer that has most; 0 where only the controller is known."""
    if arguments.controller:
        return 0
    with connect(router_address(arguments.router), timeout=5.0) as mesh:
        return max((layer.num_experts for layer in mesh.describe().layers), default=0)


def _check(wanted: tuple[int, int], report: pb.ScalingReport, experts: int) -> None:
    """Raises ConfigError for fewer servers than hold every expert once."""
    least = -(-experts // report.slots) if report.slots else 1
    if 0 < wanted[1] < least:
        raise ConfigError(
            f"{wanted[1]} servers do not hold this model: each takes {report.slots} of {experts} "
            f"experts of a layer, so there must be at least {least}"
        )


def _is_done(fleet: pb.GetFleetResponse, least: int, most: int) -> bool:
    """Whether as many servers answer as the supervisor wants, within the bounds, and no other
    is on its way."""
    wanted, ready = fleet.report.replicas, _ready(fleet)
    within = (not least or wanted >= least) and (not most or wanted <= most)
    return within and ready == wanted and not fleet.report.starting


def _ready(fleet: pb.GetFleetResponse) -> int:
    return sum(each.server.state == "ready" for each in fleet.servers)


def _wait(controller: str, wait_s: float, least: int, most: int) -> pb.GetFleetResponse:
    end = time.monotonic() + wait_s
    while True:
        fleet = control.get_fleet(controller)
        if _is_done(fleet, least, most) or time.monotonic() >= end:
            return fleet
        time.sleep(_POLL_S)


def _as_json(
    controller: str, fleet: pb.GetFleetResponse, wanted: tuple[int, int] | None, dry_run: bool,
    done: bool,
) -> dict[str, object]:  # fmt: skip
    report, bounds = fleet.report, fleet.bounds
    return {
        "controller": controller,
        "supervised": bool(fleet.lease_owner),
        "ready": _ready(fleet),
        "starting": report.starting,
        "wanted": report.replicas,
        "reason": report.reason or None,
        "problem": report.problem or None,
        "configured": [report.configured.min_replicas, report.configured.max_replicas],
        "by_hand": [bounds.min_replicas or None, bounds.max_replicas or None],
        "asked_for": None if wanted is None else [wanted[0] or None, wanted[1] or None],
        "dry_run": dry_run,
        "done": done,
    }


def _lines(fleet: pb.GetFleetResponse, wanted: tuple[int, int] | None, dry_run: bool) -> list[str]:
    report = fleet.report
    lines = [f"servers   {_ready(fleet)} ready, {report.starting} starting"]
    if fleet.lease_owner:
        configured = report.configured
        lines += [
            f"wanted    {report.replicas}: {report.reason}",
            f"bounds    {_said(fleet.bounds.min_replicas, fleet.bounds.max_replicas)}; the cluster "
            f"was started with {configured.min_replicas} to {configured.max_replicas}",
        ]
    else:
        lines.append("wanted    nobody adds or removes servers: started without --autoscale")
    if report.problem:
        lines.append(f"problem   {report.problem}")
    if wanted is not None:
        lines.append(f"{'would set' if dry_run else 'set':<10}{_said(*wanted)}")
    return lines


def _said(least: int, most: int) -> str:
    if not least and not most:
        return "none by hand"
    if least == most:
        return f"{least}, by hand"
    return f"{least or 'as configured'} to {most or 'as configured'}, by hand"
