"""`expertmesh top`: layers and servers of a running cluster, as they change."""

from __future__ import annotations

import argparse
import json
import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from expertmesh.client import Mesh, connect
from expertmesh.errors import InvalidRequestError, UnavailableError
from expertmesh.info import MeshLoad
from fleet.cli.output import emit
from fleet.cli.status import router_address
from fleet.top import LayerRow, Look, ServerRow, Top, compare

NAME = "top"
HELP = "Show load, balance and divergence of every layer, and every server, as they change."
EXAMPLES = """\
  expertmesh top                               # until Ctrl-C, the last cluster of this host
  expertmesh top --once                        # one table, over one second; so does a pipe
  expertmesh top --interval-s 5 --layers 61
  expertmesh top --router 10.0.0.7:50051 --json
"""
_WIDTH = 100  # of a table that no terminal shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--router", default="", help="host:port of a router")
    parser.add_argument("--once", action="store_true", help="one table, then end")
    parser.add_argument("--interval-s", type=float, default=1.0, help="between two looks (1)")
    parser.add_argument(
        "--layers", type=int, default=20, help="layers shown, those of the highest MaxVio (20)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0, also when it is interrupted."""
    if not arguments.interval_s > 0:
        raise InvalidRequestError(f"--interval-s is {arguments.interval_s}, expected above 0")
    with connect(router_address(arguments.router), timeout=5.0) as mesh:
        before = _look(mesh)
        if arguments.json or arguments.once or not _on_terminal():
            time.sleep(arguments.interval_s)
            _print(compare(before, _look(mesh)), arguments)
        else:
            _follow(mesh, before, arguments)
    return 0


def _on_terminal() -> bool:
    return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _look(mesh: Mesh, last: MeshLoad | None = None) -> Look:
    """A look now. Counts are the last ones while the load controller is away."""
    statuses = mesh.statuses()
    try:
        load = mesh.load()
    except UnavailableError:
        if last is None:
            raise
        load = last
    return Look(time.monotonic(), load, statuses)


def _print(top: Top, arguments: argparse.Namespace) -> None:
    if arguments.json:
        emit(json.dumps(top.as_json()))
        return
    console = Console(file=sys.__stdout__, width=None if _on_terminal() else _WIDTH)
    console.print(render(top, arguments.layers))


def _follow(mesh: Mesh, before: Look, arguments: argparse.Namespace) -> None:
    console = Console(file=sys.__stdout__)
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(arguments.interval_s)
                after = _look(mesh, before.load)
                live.update(render(compare(before, after), arguments.layers), refresh=True)
                before = after
    except KeyboardInterrupt:
        return


def render(top: Top, most_layers: int) -> Group:
    """The header and both tables."""
    shown = sorted(top.layers, key=lambda row: -row.max_violation)[:most_layers]
    hidden = len(top.layers) - len(shown)
    parts: list[Text | Table] = [_header(top), _layers(sorted(shown, key=lambda row: row.layer))]
    if hidden:
        parts.append(Text(f"{hidden} more layers, of lower MaxVio: --layers {len(top.layers)}"))
    return Group(*parts, _servers(top.servers))


def _header(top: Top) -> Text:
    alive = "alive" if top.balance_alive else "NOT ALIVE: biases stand still"
    controller = "connected" if top.controller_connected else "away"
    return Text(
        f"balance {top.balance_mode}, {alive}; controller {controller}; bias version "
        f"{top.bias_version}, epoch {top.epoch}, routers {top.routers}"
    )


def _layers(rows: list[LayerRow]) -> Table:
    table = _table("layer", "picks/s", "MaxVio", "window", "divergence", "delta", "hottest",
                   "coldest")  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.layer),
            f"{row.assignments_per_s:,.0f}",
            f"{row.max_violation:.3f}",
            f"{row.window_max_violation:.3f}",
            f"{row.divergence:.2%}",
            f"{row.max_abs_delta:.4f}",
            f"#{row.hottest} {row.hottest_share:.1%}",
            f"#{row.coldest} {row.coldest_share:.1%}",
        )
    return table


def _servers(rows: tuple[ServerRow, ...]) -> Table:
    table = _table("server", "rows/s", "queue", "state", "backend", "node")
    for row in rows:
        table.add_row(
            row.server_id,
            f"{row.rows_per_s:,.0f}",
            str(row.requests_in_flight),
            row.state if row.connected else f"{row.state}*",
            row.backend,
            row.node,
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        left = column in ("server", "state", "backend", "node")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table
