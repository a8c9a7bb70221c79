"""`expertmesh plan --trace`: a cluster in the simulator."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

from expertmesh.config import AutoscaleConfig
from expertmesh.errors import ConfigError
from fleet.cli.output import emit
from load_controller.simulator import (
    Control,
    FleetSpec,
    Report,
    Trace,
    simulate,
    smallest_static,
)
from load_controller.simulator.generators import GENERATORS, make_trace
from load_controller.simulator.trace_file import parse_trace

_T = TypeVar("_T", AutoscaleConfig, FleetSpec, Control)
#: A static cluster is looked for up to this many times what the peak keeps busy.
_STATIC_REACH = 3


def add_arguments(parser: Any) -> None:
    """The arguments that only a trace has."""
    names = ", ".join(GENERATORS)
    parser.add_argument(
        "--trace", default="", help=f"a JSON or CSV file, or {names}, with :KEY=VALUE,..."
    )
    parser.add_argument(
        "--servers", type=int, nargs="+", default=[], metavar="N", help="fixed sizes (autoscaled)"
    )
    parser.add_argument(
        "--static", action="store_true", help="also find the smallest fixed size with the same p99"
    )
    parser.add_argument("--seed", type=int, default=0, help="of counts and queues (0)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="autoscale.*, server.* or control.*; may be given several times",
    )  # fmt: skip


def is_used(arguments: argparse.Namespace) -> bool:
    """Whether an argument was given that only a trace has."""
    return bool(arguments.servers or arguments.static or arguments.set or arguments.seed)


def run(arguments: argparse.Namespace) -> int:
    """Simulates and prints. Always 0."""
    trace = read_trace(arguments.trace)
    most = ceil(_STATIC_REACH * trace.tokens_per_s.max() / FleetSpec().tokens_per_s)
    autoscale, spec, control = _settings(arguments.set, trace, most)
    runs: list[tuple[str, Report]] = []
    for servers in arguments.servers:
        fixed = replace(control, servers=servers)
        runs.append((f"{servers} servers", simulate(trace, spec, fixed, arguments.seed)))
    if not arguments.servers or arguments.static:
        scaled = replace(control, autoscale=autoscale)
        report = simulate(trace, spec, scaled, arguments.seed)
        runs.append(("autoscaled", report))
        if arguments.static:
            reach = max(most, report.servers[2])
            static = smallest_static(
                trace, spec, control, report.delay_p99_s, reach, arguments.seed
            )
            runs.append(("static, same p99", static))
    if arguments.json:
        named = [{"name": name, **report.as_json()} for name, report in runs]
        emit(json.dumps({"trace": arguments.trace, "seed": arguments.seed, "runs": named}))
    else:
        emit("\n".join(_table(runs)))
    return 0


def read_trace(name: str) -> Trace:
    """From a generator's name, or a file. Raises ConfigError."""
    if name.partition(":")[0] in GENERATORS:
        return make_trace(name)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(GENERATORS)
        raise ConfigError(f"there is no file {name}, and no trace of that name: known are {known}")
    try:
        return parse_trace(path.read_text(), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from None


def _settings(
    pairs: Sequence[str], trace: Trace, most: int
) -> tuple[AutoscaleConfig, FleetSpec, Control]:
    given: dict[str, dict[str, str]] = {"autoscale": {}, "server": {}, "control": {}}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        section, _, key = name.partition(".")
        if not equals or section not in given:
            raise ConfigError(
                f"--set {pair}: expected autoscale.*, server.* or control.* = a value"
            )
        given[section][key] = value
    spec = _with(FleetSpec(), given["server"], "server")
    least = ceil(trace.experts / spec.slots)
    autoscale = AutoscaleConfig(max_replicas=max(least, most), max_redundant=trace.experts)
    autoscale = _with(autoscale, given["autoscale"], "autoscale")
    control = _with(
        Control(servers=max(least, autoscale.min_replicas)), given["control"], "control"
    )
    return autoscale, spec, control


def _with(section: _T, given: dict[str, str], name: str) -> _T:
    """The section with some values replaced."""
    known = {field.name for field in fields(section)} - {"autoscale"}
    values: dict[str, float | int | None] = {}
    for key, text in given.items():
        if key not in known:
            raise ConfigError(f"{name} has no setting {key!r}: expected one of {sorted(known)}")
        try:
            whole = isinstance(getattr(section, key), int) or "." not in text
            values[key] = None if text == "none" else int(text) if whole else float(text)
        except ValueError:
            raise ConfigError(f"{name}.{key} is {text!r}, expected a number") from None
    return replace(section, **values)  # type: ignore[arg-type]


def _table(runs: Sequence[tuple[str, Report]]) -> list[str]:
    lines: list[str] = []
    for name, report in runs:
        lines += [f"{'run':<27} {name}", *report.lines(), ""]
    if len(runs) > 1:
        dearest = max(report.server_hours for _, report in runs)
        lines += [f"{'run':<20} {'server-hours':>12} {'fewer':>7} {'p50':>10} {'p99':>10}"]
        for name, report in runs:
            fewer = 100 * (1 - report.server_hours / dearest)
            lines.append(
                f"{name:<20} {report.server_hours:>12.1f} {fewer:>5.1f} % "
                f"{report.delay_p50_s:>8.4f} s {report.delay_p99_s:>8.4f} s"
            )
    return lines if len(runs) > 1 else lines[:-1]
