"""`expertmesh plan`: what the planner and the autoscaler would do; done only with --apply."""

from __future__ import annotations

import argparse
import json

from expertmesh.errors import ConfigError
from fleet.cli import plan_trace
from fleet.cli.output import emit
from fleet.cli.status import router_address
from fleet.control import migrate
from fleet.proposal import LayerProposal, Proposal, propose
from fleet.survey import survey

NAME = "plan"
HELP = "Show what should change in a cluster and why; do it with --apply. Or simulate a trace."
EXAMPLES = """\
  expertmesh plan                              # the last cluster, from all that it has counted
  expertmesh plan --window 30 --redundant 16   # from 30 s of its load, with 16 more slots a layer
  expertmesh plan --window 30 --apply          # move the experts, while requests go on
  expertmesh plan --trace day                  # a day in the simulator, autoscaled
  expertmesh plan --trace day:exponent=0.6,hours=6 --servers 40 60 --json
  expertmesh plan --trace load.csv --static --set autoscale.target_utilization=0.6

docs/placement.md says what traces look like, and what the simulator leaves out.
"""
_SHOWN_MOVES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    cluster = parser.add_argument_group("a running cluster")
    cluster.add_argument("--router", default="", help="host:port of a router")
    cluster.add_argument(
        "--redundant", type=int, help="slots of a layer beyond one an expert (as many as there are)"
    )
    cluster.add_argument(
        "--window", type=float, default=0.0, metavar="S", help="count for S seconds (all so far)"
    )
    cluster.add_argument("--apply", action="store_true", help="move the experts as planned")
    plan_trace.add_arguments(parser.add_argument_group("the simulator"))


def run(arguments: argparse.Namespace) -> int:
    """0: a plan was shown, and with --apply it is done."""
    if arguments.trace:
        return plan_trace.run(arguments)
    if plan_trace.is_used(arguments):
        raise ConfigError("--servers, --static, --seed and --set need a --trace")
    if arguments.window < 0 or (arguments.redundant or 0) < 0:
        raise ConfigError("--window and --redundant must not be negative")
    address = router_address(arguments.router)
    seen = survey(address, arguments.window)
    proposal = propose(seen, arguments.redundant)
    if not arguments.json:
        emit("\n".join(_lines(address, seen.epoch, arguments.window, proposal)))
    done = None
    if arguments.apply:
        moves = [move for each in proposal.layers for move in each.moves]
        done = migrate(seen.controller, moves)
    if arguments.json:
        said = _as_json(address, seen.epoch, arguments.window, proposal)
        emit(json.dumps(said | {"applied_epoch": done.epoch if done else None}))
    elif done is None:
        emit("\nNothing was changed: --apply does it.")
    else:
        emit(f"\nDone: {done.loaded} slots loaded, {done.dropped} dropped, epoch {done.epoch}.")
    return 0


def _as_json(address: str, epoch: int, window_s: float, proposal: Proposal) -> dict[str, object]:
    return {
        "address": address,
        "epoch": epoch,
        "window_s": window_s or None,
        "counted": proposal.counted,
        "redundant": proposal.redundant,
        "load_bytes": round(proposal.load_bytes),
        "planned_without": list(proposal.without),
        "layers": [
            {
                "layer": each.layer,
                "maxvio_before": _finite(each.maxvio_before),
                "maxvio_after": each.maxvio_after,
                "busiest": each.busiest or None,
                "hottest": [{"expert": e, "share": share} for e, share in each.hottest],
                "moves": [move._asdict() for move in each.moves],
            }
            for each in proposal.layers
        ],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: null is "an expert is on no server"."""
    return None if value == float("inf") else value


def _lines(address: str, epoch: int, window_s: float, proposal: Proposal) -> list[str]:
    counted = f"{proposal.counted} assignments"
    counted += f" of {window_s:g} s" if window_s else " since the cluster was first started"
    lines = [f"cluster     {address}, epoch {epoch}", f"load        {counted}"]
    if not proposal.counted:
        lines.append("            nothing was counted: the experts' loads are taken as unknown")
    if proposal.without:
        lines.append(f"without     {', '.join(proposal.without)}: not ready, planned as gone")
    before = [each.maxvio_before for each in proposal.layers]
    after = [each.maxvio_after for each in proposal.layers]
    loads = sum(each.loads for each in proposal.layers)
    drops = sum(each.drops for each in proposal.layers)
    lines += [
        f"redundant   {proposal.redundant} slots of a layer beyond one an expert",
        f"MaxVio      of servers {sum(before) / len(before):.3f} -> {sum(after) / len(after):.3f}, "
        "mean over layers",
        f"moves       {loads} slots to load (about {proposal.load_bytes / 1e6:.1f} MB), {drops} to "
        "drop",
        "",
        f"{'layer':>5}  {'MaxVio':>16}  {'load':>5} {'drop':>5}  why, and what",
    ]
    for each in proposal.layers:
        change = f"{each.maxvio_before:.3f} -> {each.maxvio_after:.3f}"
        lines.append(
            f"{each.layer:>5}  {change:>16}  {each.loads:>5} {each.drops:>5}  {_why(each)}"
        )
        if each.moves:
            lines.append(f"{'':>38}{_what(each)}")
    return lines


def _why(each: LayerProposal) -> str:
    if each.maxvio_before == float("inf"):
        return "an expert is on no server that is ready"
    if not each.hottest:
        return "no load was counted"
    hottest = ", ".join(f"{expert} ({100 * share:.0f} %)" for expert, share in each.hottest)
    why = f"{each.busiest} does most, for experts {hottest}"
    return why if each.moves else f"{why}; no move is worth its loading"


def _what(each: LayerProposal) -> str:
    signs = {"load": "+", "drop": "-"}
    shown = [f"{m.server} {signs[m.action]}{m.expert}" for m in each.moves[:_SHOWN_MOVES]]
    more = len(each.moves) - len(shown)
    return ", ".join(shown) + (f", and {more} more: see --json" if more else "")
