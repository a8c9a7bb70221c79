"""Mutation tests of the deciding modules: `make mutants`.

Changes each module in one small way at a time (mutmut) and runs the unit tests beside it, in
processes forked from one that has imported them. A change that no test notices fails the run,
unless scripts/mutants.toml lists it as one that changes nothing, with the reason. That file also
says which tests belong to which module.

Not changed: the wording of messages, names and values at module level, and functions under a
decorator other than @property, @classmethod and @staticmethod.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst
from mutmut.mutation.diff_apply import read_mutant_function, read_original_function
from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "scripts/mutants.toml"
WORK = ROOT / "build/mutants"
PACKAGES = ("expertmesh", "router_service", "expert_service", "load_controller", "fleet")
NOTICED = ("killed", "timeout", "segfault")
NOT_RUN = 255  # pytest did not know a test by the name that it had given: mutmut calls it "timeout"

#: unraisableexception collects garbage again and again, which is half of a short run's time.
PYTEST = [
    "-pno:cacheprovider",
    "-pno:unraisableexception",
    "--hypothesis-profile=mutants",
    "--timeout=60",  # one that waits for ever uses no processor
]

#: Ends a mutant that does not end by itself, after so long on a processor in one test. mutmut has
#: limits on the clock, of which a busy machine needs any amount, so those are set far off.
CONFTEST = """
import resource

def pytest_runtest_setup():
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 20, hard))
"""
FAR_OFF = 100.0

#: A line that holds nothing but a sentence, in a message or in the log.
PROSE = r"""^\s*(raise \w+\(|_log\.\w+\()?f?"[^"]* [^"]*"(,|\)|\s)*$"""


@dataclass(frozen=True)
class Mutant:
    """One change: the lines of the function before and after it."""

    function: str
    was: str
    now: str


@dataclass(frozen=True)
class Result:
    """What became of one module's mutants."""

    module: str
    total: int
    survivors: Counter[Mutant]


@dataclass(frozen=True)
class Group:
    """Modules that are tested together, and the tests beside them."""

    name: str
    modules: list[str]
    tests: list[str]

    @property
    def folder(self) -> Path:
        """Where its mutants are made and run."""
        return WORK / self.name

    def mutated(self, module: str) -> Path:
        """A module with all its mutants in it."""
        return self.folder / "mutants" / module

    def codes(self, module: str) -> dict[str, int | None]:
        """By mutant of a module, how its tests ended."""
        meta = Path(f"{self.mutated(module)}.meta")
        codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
        if NOT_RUN in codes.values():
            raise SystemExit(f"{module}: tests that were not run: give their parameters plain ids")
        return codes

    def survivors(self, module: str) -> list[str]:
        """The mutants of a module that no test noticed."""
        codes = self.codes(module).items()
        return [name for name, code in codes if status_by_exit_code[code] not in NOTICED]


def main() -> int:
    """Prints the score by module; 1 where a mutant survives that nobody has looked at."""
    table = tomllib.loads(TABLE.read_text())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=", ".join(table["groups"]))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--again", action="store_true", help="only those that survived last time; source as it was"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(table["groups"])
    if unknown:
        parser.error(f"{TABLE.name} has no {', '.join(sorted(unknown))}")
    equal, kinds = _equal(table), _kinds(table)
    wrong = 0
    for name in arguments.groups or table["groups"]:
        for result in _tested(Group(name=name, **table["groups"][name]), arguments):
            wrong += _print(result, equal.get(result.module, Counter()), kinds)
    return int(wrong > 0)


def _equal(table: dict[str, Any]) -> dict[str, Counter[Mutant]]:
    """The reviewed mutants by module."""
    known: dict[str, Counter[Mutant]] = {}
    for entry in table.get("equal", []):
        assert entry["reason"]
        mutant = Mutant(entry["function"], entry["was"], entry["now"])
        known.setdefault(entry["module"], Counter())[mutant] += entry.get("times", 1)
    return known


def _kinds(table: dict[str, Any]) -> list[re.Pattern[str]]:
    """Parts of a line that change nothing, wherever they stand."""
    assert all(kind["reason"] for kind in table["equal_kind"])
    return [re.compile(kind["part"]) for kind in table["equal_kind"]]


def _print(result: Result, equal: Counter[Mutant], kinds: list[re.Pattern[str]]) -> int:
    """The score, and what to look at; returns how much that is."""
    of_a_kind = Counter(
        {
            mutant: times
            for mutant, times in result.survivors.items()
            if any(kind.sub("", mutant.was) == kind.sub("", mutant.now) for kind in kinds)
        }
    )
    survivors = result.survivors - of_a_kind
    listed = of_a_kind.total() + (survivors & equal).total()
    killed = result.total - result.survivors.total()
    print(f"{result.module:40} {killed:4} of {result.total - listed} noticed, {listed} equal")
    new, gone = survivors - equal, equal - survivors
    for kind, mutants in (("not noticed", new), ("listed as equal, but noticed", gone)):
        for mutant, times in mutants.items():
            print(f"  {kind}: {mutant.function}" + (f" ({times} times)" if times > 1 else ""))
            print(f"    - {mutant.was}\n    + {mutant.now}")
    sys.stdout.flush()
    return new.total() + gone.total()


def _tested(group: Group, arguments: argparse.Namespace) -> list[Result]:
    """Runs the tests on every mutant, or on those that no test noticed before."""
    command = [str(Path(sys.executable).parent / "mutmut"), "run"]
    command.append(f"--max-children={arguments.processes}")
    if arguments.again:
        command += [name for module in group.modules for name in group.survivors(module)]
    else:
        shutil.rmtree(group.folder, ignore_errors=True)
    _prepare(group)
    with (group.folder / "log").open("w") as log:
        ended = subprocess.run(
            command,
            cwd=group.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # a pool of threads does not survive a fork
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode:
        raise SystemExit(f"mutmut ended with {ended.returncode}: see {group.folder / 'log'}")
    return [_read(group, module) for module in group.modules]


def _prepare(group: Group) -> None:
    """A copy of the repository to run in, since mutmut takes its settings from where it runs."""
    started, folder = group.folder.exists(), group.folder
    for name in ("tests", "examples") if started else (*PACKAGES, "tests", "examples"):
        without = shutil.ignore_patterns("__pycache__", "node_modules")
        shutil.copytree(ROOT / name, folder / name, ignore=without, dirs_exist_ok=True)
    for source in () if started else map(folder.joinpath, group.modules):
        source.write_text(_with_bare_properties(source.read_text()))
    settings = {
        "source_paths": list(PACKAGES),
        "only_mutate": group.modules,
        "do_not_mutate_patterns": [PROSE],
        "also_copy": ["examples", "conftest.py"],
        "pytest_add_cli_args": PYTEST,
        "pytest_add_cli_args_test_selection": group.tests,
        "process_isolation": "forkserver",  # the tests import torch and gRPC
        "timeout_multiplier": FAR_OFF,
        "track_dependencies": False,
        "use_git_change_detection": False,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text() + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n"
    (folder / "pyproject.toml").write_text(text)
    (folder / "conftest.py").write_text(CONFTEST)


def _with_bare_properties(source: str) -> str:
    """`@property` as an assignment behind the function: mutmut leaves decorated ones alone."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(node.decorator_list) == 1:
            decorator = ast.unparse(node.decorator_list[0])
            if decorator in ("property", "cached_property"):
                indent = " " * node.col_offset
                lines[node.decorator_list[0].lineno - 1] = ""
                lines[node.end_lineno - 1] += f"\n{indent}{node.name} = {decorator}({node.name})"
    return "\n".join(lines) + "\n"


def _read(group: Group, module: str) -> Result:
    """What mutmut wrote down, with the changed lines of the mutants that survived."""
    tree = libcst.parse_module(group.mutated(module).read_text())
    survivors: Counter[Mutant] = Counter()
    for name in group.survivors(module):
        before = libcst.Module([read_original_function(tree, name)]).code
        after = libcst.Module([read_mutant_function(tree, name)]).code
        survivors[_difference(name, before, after)] += 1
    return Result(module, len(group.codes(module)), survivors)


def _difference(name: str, before: str, after: str) -> Mutant:
    """The lines that differ, without the equal ones before and behind them."""
    mangled = name.rpartition(".")[2].partition("__mutmut")[0]
    function = mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    was, now = before.splitlines(), after.splitlines()
    while was and now and was[0] == now[0]:
        del was[0], now[0]
    while was and now and was[-1] == now[-1]:
        del was[-1], now[-1]
    return Mutant(function, *(" ".join(line.strip() for line in part) for part in (was, now)))


if __name__ == "__main__":
    sys.exit(main())
