"""Steps that all have to happen, whatever one of them raises."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

_log = logging.getLogger(__name__)

Exit = Callable[
    [type[BaseException] | None, BaseException | None, TracebackType | None], bool | None
]


def run_all(*steps: tuple[str, Callable[[], object]]) -> None:
    """Runs every step, in turn, also after one that raised. Raises the first error; what later
    steps raise is logged. Each step comes with what it does, in words."""
    with ExitStack() as stack:
        for what, run in reversed(steps):
            stack.push(step(what, run))


def step(what: str, run: Callable[[], object]) -> Exit:
    """`run` as an exit of an ExitStack that keeps the error under way: its own is logged then."""

    def leave(
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        try:
            run()
        except BaseException as own:
            if error is None:
                raise
            _log.warning("%s: %r", what, own)
        return False

    return leave
