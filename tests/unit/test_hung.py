"""What hangs is told from what starts, what has ended, and what stood still with everybody else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fleet.hung import Answer, Silence

P, G, A = Answer.PENDING, Answer.GIVEN, Answer.AWAY


def _looks(
    answers: Sequence[Answer], after_s: float = 3.0, excused: Sequence[str] = ()
) -> list[int]:
    """At which of the looks, a second apart, the one actor is said to hang."""
    silence = Silence(after_s, look_s=1.0)
    return [
        at
        for at, answer in enumerate(answers)
        if silence.hung({"a": answer}, {}, excused, now=float(at))
    ]


def test_an_actor_that_has_answered_and_then_says_nothing_hangs_after_a_while() -> None:
    assert _looks([A, G, P, P, P]) == []
    assert _looks([A, G, P, P, P, P, P]) == [5]


def test_an_actor_that_is_known_to_have_started_hangs_before_it_was_ever_asked() -> None:
    silence = Silence(3.0, look_s=1.0, started=["a"])

    hung = [silence.hung({"a": P, "b": P}, {}, [], float(at)) for at in range(6)]

    assert hung == [[], [], [], [], ["a"], []]


def test_an_answer_begins_the_time_anew() -> None:
    assert _looks([A, G, P, P, P, G, P, P, P]) == []


def test_what_has_not_answered_yet_is_starting_however_long_that_takes() -> None:
    assert _looks([A, *[P] * 1000]) == []


def test_what_ray_restarts_is_left_to_ray_until_it_answers_again() -> None:
    assert _looks([A, G, P, P, A, *[P] * 100]) == []
    assert _looks([A, G, P, P, A, *[P] * 100, G, P, P, P, P]) == [109]


def _looks_of_lives(looks: Sequence[tuple[Answer, str]]) -> list[int]:
    """The same, where another hears it live as that incarnation ("": does not hear it)."""
    silence = Silence(3.0, look_s=1.0)
    return [
        at
        for at, (answer, life) in enumerate(looks)
        if silence.hung({"a": answer}, {"a": life} if life else {}, [], now=float(at))
    ]


def test_one_that_hangs_before_it_has_answered_here_is_known_by_who_hears_it() -> None:
    """Ray fails what was asked while it restarted an actor, also after it has started."""
    restarting = [(G, "1"), (P, ""), (A, ""), (P, "")]

    assert _looks_of_lives([*restarting, (A, ""), (P, "2"), *[(P, "")] * 5]) == [9]
    assert _looks_of_lives([*restarting, (A, "2"), *[(P, "2")] * 3, (P, "")]) == [8]
    assert _looks_of_lives([*restarting, (P, "2"), (A, "2"), *[(P, "")] * 4]) == [9]
    assert _looks_of_lives([*restarting, *[(P, "2")] * 4, (P, "")]) == [8]


def test_one_that_has_ended_and_is_still_heard_of_has_not_started_again() -> None:
    assert _looks_of_lives([(G, "1"), (A, "1"), (P, "1"), *[(P, "")] * 100]) == []
    assert _looks_of_lives([(G, "1"), (A, "1"), (P, ""), *[(P, "1")] * 100]) == []


def test_one_that_hung_and_was_ended_has_not_started_again() -> None:
    hung = [(G, "1"), (A, ""), *[(P, "2")] * 5]

    assert _looks_of_lives(hung) == [6]
    assert _looks_of_lives([*hung, (P, ""), (A, ""), *[(P, "")] * 100]) == [6]


def test_one_that_is_first_heard_by_another_has_started() -> None:
    assert _looks_of_lives([*[(P, "")] * 9, *[(P, "1")] * 5]) == [13]


def test_what_is_excused_does_not_hang_and_does_at_once_when_it_no_longer_is() -> None:
    assert _looks([A, G, *[P] * 20], excused=["a"]) == []

    silence = Silence(3.0, look_s=1.0)
    for at, answer in enumerate([A, G, *[P] * 20]):
        assert silence.hung({"a": answer}, {}, ["a"], float(at)) == []
    assert silence.hung({"a": P}, {}, [], 22.0) == ["a"]


def test_what_is_being_ended_is_named_again_only_when_that_has_not_helped() -> None:
    assert _looks([A, G, *[P] * 60]) == [5, 39]
    assert _looks([A, G, *[P] * 10, A, *[P] * 60]) == [5]


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """A virtual machine that was paused: everybody is silent at the first look after it."""
    silence = Silence(30.0, look_s=1.0)
    for at, answer in enumerate([A, G, P]):
        silence.hung({"a": answer, "b": answer}, {}, [], float(at))

    assert silence.hung({"a": P, "b": P}, {}, [], 4000.0) == []
    assert silence.hung({"a": G, "b": P}, {}, [], 4001.0) == []


def test_actors_hang_each_for_itself_and_those_that_have_gone_are_forgotten() -> None:
    silence = Silence(3.0, look_s=1.0)
    for at in range(4):
        silence.hung({"a": G, "b": G}, {}, [], float(at))
    for at in range(4, 7):
        assert silence.hung({"a": P, "b": G}, {}, [], float(at)) == []
    assert silence.hung({"a": P, "b": G}, {}, [], 7.0) == ["a"]
    assert silence.hung({"b": P}, {}, [], 8.0) == []
    assert silence.hung({"a": P, "b": P}, {}, [], 9.0) == [], "another one of that name"


@pytest.mark.parametrize("look_s", [0.5, 1.0, 5.0])
def test_however_often_it_is_looked_the_time_is_the_same(look_s: float) -> None:
    silence = Silence(30.0, look_s)
    now = 0.0
    silence.hung({"a": G}, {}, [], now)
    while not silence.hung({"a": P}, {}, [], now := now + look_s):
        assert now < 100.0

    assert 30.0 < now <= 30.0 + look_s
