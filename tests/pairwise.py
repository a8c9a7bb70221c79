"""Few combinations in which every two values of different axes meet."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

Case = dict[str, object]
_Value = tuple[str, object]  # (axis, value)


def pairwise(
    axes: Mapping[str, Sequence[object]],
    *,
    among: Sequence[Case] = (),
    seed: int = 0,
) -> list[Case]:
    """Cases with a value of each axis, so that any two values stand together in at least one.

    `among` are cases of further axes, of which each case takes one whole: pairs among those are
    theirs. Greedy, and the same for the same seed.
    """
    chance = random.Random(seed)
    starts = list(among) or [{}]
    missing = dict.fromkeys(pair for start in starts for pair in _pairs(start, axes))
    cases = []
    while missing:
        pair = next(iter(missing))
        case = _complete(dict(pair), axes, starts, missing, chance)
        for met in combinations(sorted(case.items(), key=repr), 2):
            missing.pop(met, None)
        cases.append(case)
    return cases


def _pairs(start: Case, axes: Mapping[str, Sequence[object]]) -> list[tuple[_Value, _Value]]:
    """Every pair of an axis' value with another axis' or with one of `start`, in `repr`'s order."""
    own = [(axis, value) for axis, values in axes.items() for value in values]
    pairs = [(one, two) for one, two in combinations(own, 2) if one[0] != two[0]]
    pairs += [(one, two) for one in own for two in start.items()]
    return [tuple(sorted(pair, key=repr)) for pair in pairs]  # type: ignore[misc]


def _complete(
    case: Case,
    axes: Mapping[str, Sequence[object]],
    starts: Sequence[Case],
    missing: Mapping[tuple[_Value, _Value], None],
    chance: random.Random,
) -> Case:
    """The case with a value for every axis: each time the one that meets most pairs anew."""

    def gain(candidate: Case) -> tuple[int, float]:
        pairs = combinations(sorted(candidate.items(), key=repr), 2)
        return sum(pair in missing for pair in pairs), chance.random()

    def best(candidates: list[Case]) -> Case:
        return max(candidates, key=gain)

    fitting = [start for start in starts if {**start, **case} == {**case, **start}]
    case = best([{**case, **start} for start in fitting])
    for axis in chance.sample(list(axes), len(axes)):
        if axis not in case:
            case = best([{**case, axis: value} for value in axes[axis]])
    return case
