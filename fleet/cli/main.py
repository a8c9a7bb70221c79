"""`expertmesh`: parse, run one command, say what went wrong in one line.

Exit codes: 0 done; 1 the command failed (the message says why); 2 wrong usage; 3 `status` found the
cluster not ready, `balance` a router that has not confirmed, or `scale` servers that do not answer
yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout

from expertmesh.errors import MeshError
from fleet.cli import (
    balance,
    collect_env,
    demo,
    down,
    drain,
    plan,
    rebalance,
    scale,
    serve,
    status,
    top,
)
from fleet.cli.output import as_json, emit, prepare_output

_DESCRIPTION = """Serve the experts of Mixture-of-Experts models as a cluster.

examples:
  expertmesh demo                              a whole cluster on this machine, shown at work
  expertmesh serve CHECKPOINT --shards 4       serve a Hugging Face checkpoint until Ctrl-C
  expertmesh status                            the last cluster started on this host
  expertmesh top                               its load and balance, as they change
  expertmesh plan                              what would change there, and why
  expertmesh rebalance on                      move experts by itself, where a skew asks for it
  expertmesh scale --max 6                     let it grow to six servers
  expertmesh drain auto-3                      take a server out, while requests go on
  expertmesh balance freeze                    serve the checkpoint's own routing, now
  expertmesh down                              end it
"""

_COMMANDS = (serve, status, top, plan, rebalance, scale, drain, balance, demo, collect_env, down)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each says with `run` what does the work."""
    parser = argparse.ArgumentParser(
        prog="expertmesh",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in _COMMANDS:
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP + "\n\nexamples:\n" + module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. The exit code."""
    arguments = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    prepare_output()
    try:
        # Ray prints notices on standard output, which is for what the command has to say.
        with redirect_stdout(sys.stderr):
            return run(arguments)
    except MeshError as error:
        if arguments.json:
            emit(json.dumps({"error": as_json(error)}))
        else:
            print(f"error: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
