"""Whose turn it is on the device."""

from __future__ import annotations

from expert_service.device_queue import DeviceQueue, Job


def _taken(queue: DeviceQueue, names: dict[Job, str]) -> list[list[tuple[str, int, int]]]:
    """Everything the queue gives until it is empty."""
    turns = []
    while pieces := queue.next():
        turns.append([(names[piece.job], piece.start, piece.stop) for piece in pieces])
    return turns


def _queue(*jobs: tuple[str, str, int]) -> tuple[DeviceQueue, dict[Job, str]]:
    """A queue of (name, key, rows), merged up to 8 rows and cut into blocks of 10."""
    queue, names = DeviceQueue(merge_rows=8, block_rows=10), {}
    for name, key, rows in jobs:
        job = Job(key, rows)
        names[job] = name
        queue.push(job)
    return queue, names


def test_an_empty_queue_gives_nothing() -> None:
    assert DeviceQueue(8, 10).next() == []


def test_small_jobs_of_one_layer_are_computed_together_and_others_keep_their_turn() -> None:
    turns = _taken(*_queue(("a", "x", 2), ("b", "y", 1), ("c", "x", 3), ("d", "y", 1)))

    assert turns == [[("a", 0, 2), ("c", 0, 3)], [("b", 0, 1), ("d", 0, 1)]]


def test_jobs_are_merged_only_as_far_as_they_fit_whole() -> None:
    turns = _taken(*_queue(("a", "x", 5), ("b", "x", 4), ("c", "x", 3)))

    assert turns == [[("a", 0, 5), ("c", 0, 3)], [("b", 0, 4)]]


def test_a_large_job_alone_is_computed_in_one_go() -> None:
    assert _taken(*_queue(("a", "x", 35))) == [[("a", 0, 35)]]


def test_a_very_large_job_alone_looks_for_others_after_four_blocks() -> None:
    assert _taken(*_queue(("a", "x", 85))) == [[("a", 0, 40)], [("a", 40, 80)], [("a", 80, 85)]]


def test_who_comes_while_a_very_large_job_is_alone_goes_next_but_one_block() -> None:
    queue, names = _queue(("big", "x", 85))
    (first,) = queue.next()
    late = Job("y", 1)
    names[late] = "late"
    queue.push(late)

    assert (first.start, first.stop) == (0, 40)
    assert _taken(queue, names) == [[("big", 40, 50)], [("late", 0, 1)], [("big", 50, 85)]]


def test_a_large_job_lets_others_go_first_after_each_block() -> None:
    turns = _taken(*_queue(("big", "x", 25), ("b", "y", 1), ("c", "z", 1)))

    assert turns == [[("big", 0, 10)], [("b", 0, 1)], [("c", 0, 1)], [("big", 10, 25)]]


def test_two_large_jobs_take_turns() -> None:
    turns = _taken(*_queue(("a", "x", 25), ("b", "x", 15)))

    assert turns == [
        [("a", 0, 10)],
        [("b", 0, 10)],
        [("a", 10, 20)],
        [("b", 10, 15)],
        [("a", 20, 25)],
    ]


def test_a_job_without_rows_gets_its_turn_too() -> None:
    assert _taken(*_queue(("a", "x", 0))) == [[("a", 0, 0)]]
