"""Which actors hang, by whether they answer. Pure.

An actor that has ended is Ray's to restart. One that is there and says nothing, stopped by a signal
or with an event loop that stands still, is nobody's: Ray sees a process that lives.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

_ENDING_S = 30.0  # Ray takes seconds to end a process that does not react; then it is asked again


class Answer(Enum):
    """What has become of a question to an actor."""

    PENDING = "pending"
    GIVEN = "given"
    AWAY = "away"  # Ray says that the actor has not started, is being restarted or has ended


@dataclass(slots=True)
class _Asked:
    silent_s: float = 0.0  # while somebody looked
    has_answered: bool = False  # this process has, some time: before, it may still be starting


class Silence:
    """How long each actor has been silent. An actor is asked again as soon as it has answered."""

    def __init__(self, after_s: float, look_s: float, started: Collection[str] = ()) -> None:
        """One that is silent for `after_s` hangs, once it has answered. Looks are about `look_s`
        apart. Those that have `started` have answered somebody else."""
        self._after_s = after_s
        # All may have stood still together, a container or virtual machine that was paused: the
        # actors get the time to answer that they would have had.
        self._most_s = 2 * look_s
        self._asked = {name: _Asked(has_answered=True) for name in started}
        self._looked_at: float | None = None

    def hung(self, answers: dict[str, Answer], excused: Collection[str], now: float) -> list[str]:
        """Those of the actors that hang, by a look at the answers to what each was last asked.

        Those that are `excused` do not, however long they are silent. One that is named will be
        ended, and is named again only where that has not helped for long.
        """
        passed_s = min(now - self._looked_at, self._most_s) if self._looked_at is not None else 0.0
        self._looked_at = now
        self._asked = {name: self._asked.get(name, _Asked()) for name in answers}
        named = []
        for name, answer in answers.items():
            asked = self._asked[name]
            if answer is not Answer.PENDING:
                self._asked[name] = _Asked(has_answered=answer is Answer.GIVEN)
                continue
            asked.silent_s += passed_s
            if asked.has_answered and asked.silent_s > self._after_s and name not in excused:
                named.append(name)
                asked.silent_s = -_ENDING_S
        return named
