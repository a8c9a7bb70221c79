"""`expertmesh collect-env`: what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform

import torch

from fleet.cli.output import emit

NAME = "collect-env"
HELP = "Print versions and hardware, for a bug report."
EXAMPLES = """\
  expertmesh collect-env --json
"""
_PACKAGES = ("expertmesh", "torch", "ray", "grpcio", "protobuf", "triton", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run(arguments: argparse.Namespace) -> int:
    """Always 0."""
    facts = {package: _version(package) for package in _PACKAGES}
    facts |= {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": str(os.cpu_count()),
        "cuda": torch.version.cuda or "none",
        "gpus": str(torch.cuda.device_count()),
    }
    if arguments.json:
        emit(json.dumps(facts))
    else:
        emit("\n".join(f"{name:<13} {value}" for name, value in facts.items()))
    return 0
