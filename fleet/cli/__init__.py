"""The command line: `expertmesh`."""

from fleet.cli.main import main

__all__ = ["main"]
