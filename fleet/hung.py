"""Which actors hang, by whether they answer. Pure.

An actor that has ended is Ray's to restart. One that is there and says nothing, stopped by a signal
or with an event loop that stands still, is nobody's: Ray sees a process that lives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    has_started: bool = False  # its process has: one that is silent before that is loading
    life: str = ""  # the newest incarnation of it that anybody has heard
    asked_in: str = ""  # the newest one when it was asked: AWAY says that it has ended, no more


class Silence:
    """How long each actor has been silent. An actor is asked again as soon as it has answered."""

    def __init__(self, after_s: float, look_s: float, started: Collection[str] = ()) -> None:
        """One that is silent for `after_s` hangs, once it has started. Looks are about `look_s`
        apart. Those that have `started` have answered somebody else."""
        self._after_s = after_s
        # All may have stood still together, a container or virtual machine that was paused: the
        # actors get the time to answer that they would have had.
        self._most_s = 2 * look_s
        self._asked = {name: _Asked(has_started=True) for name in started}
        self._looked_at: float | None = None

    def hung(
        self, answers: Mapping[str, Answer], lives: Mapping[str, str], excused: Collection[str],
        now: float,
    ) -> list[str]:  # fmt: skip
        """Those of the actors that hang, by a look at the answers to what each was last asked.

        `lives` are the incarnations, by name, that the load controller hears now: one that it has
        not heard before has started, and hangs also where it has never answered here. At each look
        all are needed, as a new one is told by the one before it. Those that are `excused` do not
        hang, however long they are silent. One that is named will be ended, and is named again only
        where that has not helped for long.
        """
        passed_s = min(now - self._looked_at, self._most_s) if self._looked_at is not None else 0.0
        self._looked_at = now
        self._asked = {name: self._asked.get(name, _Asked()) for name in answers}
        named = []
        for name, answer in answers.items():
            asked = self._asked[name]
            life = lives.get(name, asked.life)
            if answer is not Answer.PENDING:
                # Ray may find out that one life has ended when the next has long begun.
                has_started = answer is Answer.GIVEN or life != asked.asked_in
                self._asked[name] = _Asked(has_started=has_started, life=life, asked_in=life)
                continue
            if life != asked.life:
                asked.has_started, asked.silent_s, asked.life = True, 0.0, life
                continue
            asked.silent_s += passed_s
            if asked.has_started and asked.silent_s > self._after_s and name not in excused:
                named.append(name)
                asked.silent_s, asked.asked_in = -_ENDING_S, asked.life
        return named
