"""Steps that all have to happen: whatever fails, the others are done and the first error told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from fleet.steps import run_all, step

_NAMES = ("one", "two", "three")


def _steps(
    done: list[str], errors: dict[str, BaseException]
) -> list[tuple[str, Callable[[], None]]]:
    def run(name: str) -> None:
        done.append(name)
        if name in errors:
            raise errors[name]

    return [(name, lambda name=name: run(name)) for name in _NAMES]  # type: ignore[misc]


def test_steps_run_in_turn() -> None:
    done: list[str] = []

    run_all(*_steps(done, {}))

    assert done == ["one", "two", "three"]


@pytest.mark.parametrize("failing", _NAMES)
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), SystemExit(1)])
def test_a_step_that_fails_keeps_no_other_from_running(failing: str, error: BaseException) -> None:
    done: list[str] = []

    with pytest.raises(type(error)) as caught:
        run_all(*_steps(done, {failing: error}))

    assert caught.value is error
    assert done == ["one", "two", "three"]


def test_of_several_errors_the_first_is_raised_and_the_others_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done: list[str] = []
    first, second = OSError("first"), KeyboardInterrupt("second")

    with pytest.raises(OSError, match="first"):
        run_all(*_steps(done, {"one": first, "three": second}))

    assert done == ["one", "two", "three"]
    assert [record.getMessage() for record in caplog.records] == ["three: " + repr(second)]


def test_what_fails_while_an_error_is_cleaned_up_does_not_hide_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise OSError("while closing")

    def start() -> None:
        with ExitStack() as undo:
            undo.push(step("closing", fail))
            raise ValueError("while starting")

    with pytest.raises(ValueError, match="while starting"):
        start()

    assert "closing: OSError('while closing')" in caplog.text
