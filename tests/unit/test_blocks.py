"""Blocks of an arena never overlap, and what is given back can be taken again."""

from __future__ import annotations

import itertools
import random

import pytest

from expertmesh.rpc.blocks import FreeList


@pytest.mark.parametrize("seed", range(8))
def test_blocks_in_use_never_overlap_and_all_space_comes_back(seed: int) -> None:
    generator = random.Random(seed)
    free = FreeList(100, 1100)
    taken: dict[int, int] = {}
    refused = 0

    for _ in range(2000):
        if taken and generator.random() < 0.5:
            start = generator.choice(list(taken))
            del taken[start]
            free.give(start)
            continue
        size = generator.choice([1, 3, 64, 200, 700])
        found = free.take(size)
        if found is None:
            refused += 1
            assert _largest_gap(taken) < size
            continue
        assert all(found + size <= at or at + held <= found for at, held in taken.items())
        assert 100 <= found <= found + size <= 1100
        taken[found] = size
        assert free.used == sum(taken.values())

    assert refused
    for start in taken:
        free.give(start)
    assert free.take(1000) == 100


def _largest_gap(taken: dict[int, int]) -> int:
    edges = [(100, 100), *sorted((at, at + size) for at, size in taken.items()), (1100, 1100)]
    return max(right[0] - left[1] for left, right in itertools.pairwise(edges))


def test_the_lowest_free_place_is_taken_so_that_little_is_ever_touched() -> None:
    free = FreeList(0, 1000)
    first, second, third = (free.take(100) for _ in range(3))
    free.give(first)
    free.give(third)

    assert (first, second, third) == (0, 100, 200)
    assert free.take(60) == 0
    assert free.top == 300


def test_what_was_not_taken_cannot_be_given_back() -> None:
    free = FreeList(0, 100)
    start = free.take(10)
    free.give(start)

    with pytest.raises(KeyError):
        free.give(start)


def test_once_all_is_free_the_part_that_was_touched_is_told_once() -> None:
    free = FreeList(64, 1000)
    free.give(free.take(500))

    assert free.forget() == 564
    assert free.forget() == 64
