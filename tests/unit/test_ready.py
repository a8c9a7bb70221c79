"""How long a start that does not move is looked at."""

from __future__ import annotations

from fleet.ready import Patience


def test_patience_is_over_when_nothing_has_changed_for_longer_than_it() -> None:
    patience = Patience(10.0)

    assert not patience.is_over(None, 100.0), "the first look sees something new, whatever it is"
    assert not patience.is_over(None, 110.0)
    assert patience.is_over(None, 110.1)


def test_whatever_changes_begins_it_anew() -> None:
    patience = Patience(10.0)
    patience.is_over((1, 0), 0.0)

    assert not patience.is_over((1, 5), 10.5)
    assert not patience.is_over((1, 0), 20.6), "back to what was seen before is a change, too"
    assert patience.is_over((1, 0), 31.0)
