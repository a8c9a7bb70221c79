"""Whether an expert server can be relied on, from when it was asked and when it answered. Pure.

A server that takes long and answers others meanwhile is slow: to ask a replica too is extra work,
which `HedgeBudget` bounds. A server that answers nothing is silent, and silence costs no budget:

1. One part that it was asked for goes to a replica too, as a test, whatever the budget says. One
   test a server at a time: where everybody is merely slow, that is all the extra work.
2. If the replica answers while the server is still silent, the server is suspected. It is left out
   of new plans, and whatever it was asked for goes to replicas at once.
3. Some rows of one part at a time are copied to it as a probe, and nobody waits for that. When it
   answers one as soon as it should, it is trusted again. The sooner after that it falls silent
   again, the longer it is left alone before the next probe.

"Nothing" means nothing of at least as many rows: a peer may answer what is small and lose what is
large (a path that drops long packets does that). Then it is left out for as many rows or more.

Times are seconds of one clock that the caller reads.
"""

from __future__ import annotations

import math

from expertmesh import average

_NEW_SIZE_ROW_S = 2e-3  # a row's time where neither an answer nor the server says it: a slow CPU's
_NEW_SIZE_BYTES_PER_S = 100e6  # how fast a size not seen yet may travel: one gigabit
_PROBE_S = 2.0  # a probe that was not answered for so long is given up, and the next one sent
_PAUSE_S, _MAX_PAUSE_S = 0.05, 2.0  # before the first probe, doubled for who falls silent again
_PROBE_ROWS = 16  # of a probe, where so few tell: a server that hangs keeps what it is sent
_SETTLED_S = 10.0  # who was trusted for longer than this starts anew with the shortest pause


class Standing:
    """What a router has seen of one server."""

    def __init__(self, hedge_after_s: float, hedge_factor: float) -> None:
        """See RouterConfig."""
        self._hedge_after_s = hedge_after_s
        self._hedge_factor = hedge_factor
        self._usual_s: dict[int, float] = {}  # by size, see `_size`
        self._answered_at: dict[int, float] = {}  # by size: when it last answered so many rows
        self._suspect_from = math.inf  # the least size that it is suspected to lose
        self._next_test_at = -math.inf
        self._next_probe_at = -math.inf
        self._pause_s = _PAUSE_S
        self._trusted_at = -math.inf  # since when it is no longer suspected

    @property
    def suspected(self) -> bool:
        """Whether it is left out for any number of rows."""
        return self._suspect_from < math.inf

    def is_suspect(self, rows: int) -> bool:
        """Whether it is left out for so many rows, where another server can answer instead."""
        return _size(rows) >= self._suspect_from

    def knows(self, rows: int) -> bool:
        """Whether an answer of that size has been seen."""
        return _size(rows) in self._usual_s

    def patience_s(self, rows: int, expected_s: float, tried: int = 0) -> float:
        """How long to wait for an answer before the server is overdue.

        `expected_s` counts where the size is not known. With every server that has
        been silent for the same pairs before (`tried`) the least patience is halved: however many
        hang, all of them together cost little more than twice the first one.
        """
        least_s = self._hedge_after_s / (1 << tried)
        usual_s = self._usual_s.get(_size(rows))
        if usual_s is None:
            return least_s + self._hedge_factor * expected_s
        return max(least_s, self._hedge_factor * usual_s)

    def answered(self, now: float, asked_at: float, rows: int, patience_s: float) -> bool:
        """Notes an answer. Whether the server is trusted again because of it."""
        size, took_s = _size(rows), now - asked_at
        usual_s = self._usual_s.get(size)
        if usual_s is None:
            self._usual_s[size] = min(took_s, patience_s)
        else:  # an answer that came after a hang says nothing of what is usual
            capped_s = min(took_s, self._hedge_factor * usual_s)
            self._usual_s[size] = average.moved(usual_s, capped_s)
        self._answered_at[size] = now
        if size < self._suspect_from or not self.suspected:
            return False
        if took_s > patience_s:  # alive, and late: the next one tells
            self._next_probe_at = min(self._next_probe_at, now + self._pause_s)
            return False
        self._suspect_from, self._trusted_at = math.inf, now
        return True

    def answered_since(self, since: float, rows: int) -> bool:
        """Whether it has answered as many rows, or more, after that."""
        return self._last_answer_at(_size(rows)) >= since

    def silent_at(self, asked_at: float, rows: int, patience_s: float) -> float:
        """When it is silent for who asked then, if it answers nothing from now on."""
        return max(asked_at, self._last_answer_at(_size(rows))) + patience_s

    def may_test(self, now: float) -> bool:
        """Whether a part of a silent server may be asked of a replica, as a test, now.

        The next test may begin when the replica of this one has been silent too.
        """
        if now < self._next_test_at:
            return False
        self._next_test_at = now + self._hedge_after_s
        return True

    def suspect(self, now: float, rows: int, patience_s: float) -> None:
        """A replica has answered so many rows, about which this server is silent."""
        others = self.answered_since(now - patience_s, 0)  # it answers what is smaller
        if not self.suspected:
            lasted = now - self._trusted_at
            self._pause_s = (
                _PAUSE_S if lasted > _SETTLED_S else min(2 * self._pause_s, _MAX_PAUSE_S)
            )
            self._next_probe_at = now + self._pause_s
        self._suspect_from = min(self._suspect_from, _size(rows) if others else 0)

    @property
    def probe_rows(self) -> int:
        """How many rows of a part a probe needs: as many as the server is suspected to lose."""
        least = 0 if self._suspect_from in (0, math.inf) else 1 << (int(self._suspect_from) - 1)
        return max(_PROBE_ROWS, least)

    def probe_due(self, now: float, rows: int) -> bool:
        """Whether so many rows may be copied to it now, to see whether it answers."""
        return self.is_suspect(rows) and now >= self._next_probe_at

    def probe(self, now: float, patience_s: float) -> float:
        """A probe is sent. The seconds after which it is given up."""
        given_up_s = max(_PROBE_S, patience_s)
        self._next_probe_at = now + given_up_s
        return given_up_s

    def renew(self) -> None:
        """It is another process, or another way to it: nothing is known against it."""
        self._suspect_from = math.inf
        self._answered_at.clear()

    def _last_answer_at(self, size: int) -> float:
        return max(
            (at for each, at in self._answered_at.items() if each >= size), default=-math.inf
        )


class HedgeBudget:
    """Keeps second askings of slow servers to a small share of all: they cannot feed an overload.

    Silent servers do not draw on it.
    """

    def __init__(self, burst: float, share: float) -> None:
        self._left = self._burst = burst
        self._share = share

    def earn(self, parts: int) -> None:
        """So many parts were answered without a second asking."""
        self._left = min(self._burst, self._left + parts * self._share)

    def spend(self) -> bool:
        """Whether one more second asking is within the budget; it is then taken from it."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def expected_s(rows: int, pairs: int, bytes_: int, pairs_per_s: float) -> float:
    """About how long a size takes that has not been seen: `bytes_` go there and as many come back.

    `pairs_per_s` is what the server measured before it served; 0 where it has not.
    """
    compute_s = pairs / pairs_per_s if pairs_per_s > 0 else rows * _NEW_SIZE_ROW_S
    return compute_s + 2 * bytes_ / _NEW_SIZE_BYTES_PER_S


def _size(rows: int) -> int:
    """Sizes that take about as long: powers of two."""
    return rows.bit_length()
