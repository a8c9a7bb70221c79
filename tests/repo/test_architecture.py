"""Who may import whom: the rules of docs/architecture.md, read from the source with `ast`."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SERVICES = ("router_service", "expert_service", "load_controller")
FOLDERS = ("expertmesh", *SERVICES, "fleet", "examples", "benchmarks", "tests")

# What of ours each folder may import, besides itself.
ALLOWED = {
    "expertmesh": (),
    "router_service": ("expertmesh",),
    "expert_service": ("expertmesh",),
    "load_controller": ("expertmesh",),
    "fleet": ("expertmesh", *SERVICES),
    "examples": ("expertmesh", "fleet", "load_controller.policy"),
    "benchmarks": FOLDERS,
    "tests": FOLDERS,
}

# Where a module may be imported, and nowhere else.
ONLY_IN = {
    "ray": ("expert_service/actor.py", "fleet/", "tests/", "benchmarks/"),
    # It pulls Ray in, without which the services run too.
    "expert_service.actor": ("fleet/", "tests/", "benchmarks/"),
    "llvmlite": (
        "expertmesh/kernels/",
        "expert_service/kernels/",
        "router_service/kernels/",
        "tests/",
    ),
    "prometheus_client": ("expertmesh/telemetry/", "tests/"),
    "triton": ("expert_service/kernels/", "tests/", "benchmarks/"),
    # The demo shows that the cluster and the model in process write the same text.
    "transformers": (
        "expertmesh/huggingface/",
        "fleet/demo.py",
        "examples/",
        "tests/",
        "benchmarks/",
    ),
}

PURE = (
    "expertmesh/average.py",
    "expertmesh/codec/narrow.py",
    "expertmesh/dispatch.py",
    "expertmesh/gating.py",
    "expertmesh/model.py",
    "expertmesh/placement.py",
    "expertmesh/codec/references.py",
    "expertmesh/rpc/address.py",
    "expertmesh/rpc/blocks.py",
    "expertmesh/telemetry/metric.py",
    "expertmesh/training/losses.py",
    "load_controller/autoscale.py",
    "load_controller/autoscale_state.py",
    "fleet/hung.py",
    "fleet/measured.py",
    "fleet/moves_away.py",
    "fleet/redundancy.py",
    "fleet/scaling.py",
    "fleet/top.py",
    "load_controller/balancer.py",
    "load_controller/divergence.py",
    "load_controller/forecast.py",
    "load_controller/ledger.py",
    "load_controller/planner.py",
    "load_controller/rebalancer.py",
    "load_controller/planner_counts.py",
    "load_controller/planner_pack.py",
    "load_controller/planner_search.py",
    "load_controller/planner_servers.py",
    "load_controller/planner_spread.py",
    "load_controller/planner_stay.py",
    "load_controller/policy.py",
    "load_controller/scaling.py",
    "load_controller/simulator/fleet.py",
    "load_controller/simulator/generators.py",
    "load_controller/simulator/measure.py",
    "load_controller/simulator/queues.py",
    "load_controller/simulator/report.py",
    "load_controller/simulator/rows.py",
    "load_controller/simulator/simulate.py",
    "load_controller/simulator/static.py",
    "load_controller/simulator/trace.py",
    "load_controller/simulator/trace_file.py",
    "router_service/meter.py",
    "router_service/routing.py",
    "router_service/standing.py",
)
IMPURE = ("asyncio", "datetime", "grpc", "os", "ray", "socket", "threading", "time")


def _sources() -> list[str]:
    paths = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    names = (
        path.relative_to(ROOT).as_posix() for path in paths if "node_modules" not in path.parts
    )
    return sorted(name for name in names if not name.startswith("expertmesh/v1/"))


def _imports(source: str) -> list[str]:
    """Dotted names that a file imports, at its top or anywhere in it."""
    names = []
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


IMPORTS = [(source, name) for source in _sources() for name in _imports(source)]


def _is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_neither_sideways_nor_back(folder: str) -> None:
    ours = [
        (source, name)
        for source, name in IMPORTS
        if source.startswith(folder + "/") and _is_within(name, FOLDERS)
    ]

    assert [each for each in ours if not _is_within(each[1], (folder, *ALLOWED[folder]))] == []


@pytest.mark.parametrize("module", ONLY_IN)
def test_a_confined_module_is_imported_only_where_it_belongs(module: str) -> None:
    users = [source for source, name in IMPORTS if _is_within(name, (module,))]

    assert [source for source in users if not source.startswith(ONLY_IN[module])] == []


def test_deciding_code_has_no_network_no_clock_and_no_environment() -> None:
    assert {source for source, _ in IMPORTS} >= set(PURE)
    assert [each for each in IMPORTS if each[0] in PURE and _is_within(each[1], IMPURE)] == []


def _modules() -> dict[str, str]:
    """Files by the dotted name of their module."""
    return {
        source.removesuffix(".py").removesuffix("/__init__").replace("/", "."): source
        for source in _sources()
    }


def test_no_imports_go_round_in_a_circle() -> None:
    """Also none inside functions or for type checkers: who reads one file must read the other."""
    modules = _modules()
    uses: dict[str, set[str]] = {source: set() for source in modules.values()}
    for source, name in IMPORTS:
        used = modules.get(name) or modules.get(name.rpartition(".")[0])
        if used is not None and used != source:
            uses[source].add(used)
    sorter = graphlib.TopologicalSorter(uses)

    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_imports_are_absolute() -> None:
    assert [each for each in IMPORTS if each[1].startswith(".")] == []
