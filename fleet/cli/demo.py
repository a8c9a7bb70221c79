"""`expertmesh demo`: a whole cluster on this machine, shown at work and under fire."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from expertmesh.errors import ConfigError
from fleet.cli import demo_report
from fleet.cli.interrupts import Interrupts
from fleet.cli.output import can_show, emit, loading_bars
from fleet.demo import run_demo
from fleet.launch import launch

NAME = "demo"
HELP = "Serve the example model on this machine, generate text, kill a server, show the load."
EXAMPLES = """\
  expertmesh demo
  expertmesh demo --tokens 200 --shards 3 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--checkpoint", default="", help="folder of the example model")
    parser.add_argument("--shards", type=int, default=2, help="parts of the model (2)")
    parser.add_argument("--replicas", type=int, default=2, help="servers for each part (2)")
    parser.add_argument("--tokens", type=int, default=120, help="tokens to generate (120)")
    parser.add_argument("--prompt", default=demo_report.PROMPT, help="text to continue")


def example_model() -> Path:
    """The example model of this source tree. Raises ConfigError when it is not there."""
    path = Path(__file__).resolve().parents[2] / "examples" / "tiny_deepseek"
    if not (path / "model.safetensors").exists():
        raise ConfigError(
            f"the example model is not at {path}: run the demo from a source checkout, or name a "
            "folder with --checkpoint"
        )
    return path


def run(arguments: argparse.Namespace) -> int:
    """0 when every text was right, 1 when one was not."""
    interrupts = Interrupts()
    path = Path(arguments.checkpoint) if arguments.checkpoint else example_model()
    quiet: bool = arguments.json
    say = _silent if quiet else emit
    say(f"Serving {path.name}: {arguments.shards} shards x {arguments.replicas} replicas on Ray.")
    started = time.perf_counter()
    with ExitStack() as stack:
        with loading_bars(quiet=quiet, check=interrupts.check) as progress:
            cluster = stack.enter_context(
                launch(
                    path,
                    shards=arguments.shards,
                    replicas=arguments.replicas,
                    dtype="float32",  # so that the text can be compared with one process's
                    progress=progress,
                    command=NAME,
                )
            )
        ready_s = time.perf_counter() - started
        say(f"READY {cluster.address} after {ready_s:.1f} s.\n")
        # Ray has much to say about the death of an actor; here it is meant to die.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            result = run_demo(
                cluster.address, path, arguments.prompt, arguments.tokens, ready_s, _streamed(quiet)
            )
    if quiet:
        emit(json.dumps(result.as_json()))
    else:
        bars = demo_report.BARS if can_show(demo_report.BARS) else demo_report.ASCII_BARS
        emit(demo_report.render(result, _width(), bars))
    return 0 if result.all_right else 1


def _streamed(quiet: bool) -> Any:
    """Shows text as it is generated, on a terminal only."""
    if quiet or sys.__stdout__ is None or not sys.__stdout__.isatty():
        return None
    return lambda text: emit(text, end="")


def _width() -> int:
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def _silent(text: str) -> None:
    """Says nothing: the JSON at the end says all."""
