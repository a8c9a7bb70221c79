"""Whatever goes on beside the call that starts it has an owner, and an answer to its own end.

Each place that starts a task or a thread is found with `ast`. One that keeps a loop, by
`TaskSet.keep`, needs no more: what becomes of a kept loop is tried in integration/test_loops.py.
Any other must be written down here, with who notices that it has ended and what happens then.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDERS = ("expertmesh", "router_service", "expert_service", "load_controller", "fleet")
STARTS = ("Thread", "create_task", "ensure_future", "keep", "run_coroutine_threadsafe", "spawn",
          "submit")  # fmt: skip


class Start(NamedTuple):
    """One place."""

    where: str  # "file function callee"
    kept: str  # the loop's name, where `keep` keeps it


#: Where something is started that `keep` does not keep: what its end means.
ANSWERS = {
    # Work that somebody waits for, and hears the error of.
    "expertmesh/rpc/loop.py submit run_coroutine_threadsafe": "its caller has the future",
    "expertmesh/rpc/loop.py run submit": "its caller waits",
    "expertmesh/router_link.py RouterLink.control ensure_future": "its caller waits",
    "expertmesh/router_link.py RouterLink._ends_or_lives ensure_future": "its caller waits",
    "expertmesh/router_link.py RouterLink._look spawn": "the next look is due, whatever ends it",
    "expertmesh/router_link.py RouterLink._suspect spawn":
        "no answer to its question ends it; a bug is logged, and the router is the last choice",
    "expertmesh/rpc/process.py run_until_signal ensure_future": "the process ends with either",
    "expertmesh/rpc/served_frames.py ServedFrames._start_if_complete create_task":
        "answers its frame, with an error if need be; the session's group ends with a bug of ours",
    "expertmesh/rpc/session.py FrameSession._until_the_end create_task":
        "the group ends with either, the call with the group, and its caller opens another",
    "expertmesh/telemetry/exposition.py _OnLoop.collect run_coroutine_threadsafe":
        "the scrape waits, and fails",
    "router_service/batch.py LayerQueue._start_next spawn": "every member is told",
    "router_service/fanout.py FanOut._all create_task": "the group's batch fails",
    "router_service/fanout.py FanOut._race ensure_future": "the race waits for it",
    "router_service/kernels/avx512_gate.py Avx512Gate.arrays submit": "the gate waits",
    "router_service/link.py ServerLink.ask ensure_future": "the batch has the future",
    "router_service/link.py ServerLink._serve ensure_future": "its loop waits",
    "expert_service/kernels/triton/backend/backend.py TritonBackend._compile submit": (
        "the start waits"
    ),
    "expert_service/server.py ExpertServer.start spawn":
        "loading: the server says `failed`; the device thread's watch: likewise, and each ends the "
        "process",
    "expert_service/server.py ExpertServer._fail spawn": "one message; logged",
    "load_controller/mover.py Mover._load_all create_task": "the group's step is undone",
    "load_controller/servicer.py ControlServicer._to_its_end spawn": "the caller waits",
    "fleet/control.py begin_migration submit": "the supervisor waits",
    "fleet/control.py begin_drain submit": "the supervisor waits",
    "fleet/survey.py _survey create_task": "the command waits",
    # A stream's own: any error breaks the stream, and whoever uses it opens another.
    "expertmesh/rpc/stream.py FrameStream.__init__ spawn": "breaks the stream (`_fail`)",
    "expertmesh/rpc/stream.py FrameStream._lost_data spawn": "breaks the stream itself",
    # Threads.
    "expertmesh/rpc/loop.py shared_loop Thread": "an event loop logs what callbacks raise, goes on",
    "expert_service/kernels/cpu/crew.py Crew._submit Thread": "hands over whatever a job raises",
    "expert_service/runner.py DeviceRunner.__init__ Thread":
        "the server says `failed` and its process ends (integration/test_loops.py)",
    "fleet/supervisor_actor.py SupervisorActor.__init__ Thread":
        "no error ends a turn (integration/test_loops.py); Ray restarts the process",
    "fleet/watch.py Watch.__init__ Thread": "no error ends a look",
    # Ray's side of the services.
    "fleet/actors.py ServiceHost.__init__ submit": "tries until the service has started",
    "expert_service/actor.py ExpertServerHost.__init__ submit": "tries until the files are there",
    "expert_service/actor.py ExpertServerHost._try_start create_task":
        "waits for a drained server, once",
    "expert_service/actor.py ExpertServerActor.__init__ Thread":
        "looks for the supervisor whatever Ray raises",
}  # fmt: skip


def _starts_in(file: str, node: ast.AST, within: tuple[str, ...] = ()) -> Iterator[Start]:
    """Every call within `node` that starts something."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        within = (*within, node.name)
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if called in STARTS:
            name = ast.literal_eval(node.args[1]) if called == "keep" else ""
            yield Start(f"{file} {'.'.join(within)} {called}", name)
    for child in ast.iter_child_nodes(node):
        yield from _starts_in(file, child, within)


def starts(root: Path) -> list[Start]:
    """Every start in our packages, but those of the owner itself."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    names = {path.relative_to(root).as_posix(): path for path in files}
    del names["expertmesh/rpc/tasks.py"]
    return [
        start
        for name, path in names.items()
        for start in _starts_in(name, ast.parse(path.read_text()))
    ]


def kept_loops(root: Path) -> set[str]:
    """The name of every loop that `TaskSet.keep` keeps."""
    return {start.kept for start in starts(root) if start.kept}


def test_whatever_is_started_is_kept_or_has_an_answer_to_its_end(root: Path) -> None:
    others = {start.where for start in starts(root) if not start.kept}

    assert others - ANSWERS.keys() == set(), "keep it, or write down what its end means"
    assert ANSWERS.keys() - others == set(), "it is not started any more"


@pytest.mark.parametrize(
    "source",
    ["async def run(self): self._tasks.spawn(self._poll(), 'poll')",
     "def run(): threading.Thread(target=poll, daemon=True).start()",
     "async def run(): poller = asyncio.create_task(poll())"],
)  # fmt: skip
def test_a_loop_that_is_only_started_is_found(source: str) -> None:
    (found,) = _starts_in("router_service/poller.py", ast.parse(source))

    assert not found.kept
    assert found.where not in ANSWERS
