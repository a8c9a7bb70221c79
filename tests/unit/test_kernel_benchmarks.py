"""The benchmark of the expert kernels: its floors, and what it asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.gpu_timing import Sides, fastest
from benchmarks.kernel_cases import SHARDS, TOKENS, Chip, floor_us, required_us

DEEPSEEK, QWEN, LITE, MIXTRAL = SHARDS


@pytest.mark.parametrize(
    ("shard", "tokens", "hit", "floor", "by"),
    [
        (DEEPSEEK, 1, 8, 164, "memory"),
        (DEEPSEEK, 1024, 8, 925, "compute"),
        (DEEPSEEK, 8192, 8, 7401, "compute"),
        (QWEN, 1, 8, 17.6, "memory"),
        (QWEN, 128, 128, 281, "memory"),
        (QWEN, 8192, 128, 793, "compute"),
        (LITE, 1, 6, 24.1, "memory"),
        (LITE, 8192, 64, 1090, "compute"),
        (MIXTRAL, 1, 2, 164, "memory"),
        (MIXTRAL, 1024, 8, 925, "compute"),
    ],
)
def test_the_floor_is_what_memory_or_arithmetic_take(
    shard: object, tokens: int, hit: int, floor: float, by: str
) -> None:
    found = floor_us(shard, tokens, hit, "bf16")  # type: ignore[arg-type]

    assert found == (pytest.approx(floor, rel=0.01), by)


def test_fp8_halves_the_bytes() -> None:
    assert floor_us(DEEPSEEK, 1, 8, "w8a16")[0] == pytest.approx(82, rel=0.01)


@pytest.mark.parametrize(
    ("shard", "tokens", "weights", "must"),
    [
        (DEEPSEEK, 128, "bf16", 205),
        (MIXTRAL, 8192, "bf16", 9900),
        (MIXTRAL, 16, "w8a16", 0.6 * 690),
        (QWEN, 1, "w8a16", None),  # its floor is below 100 us
        (DEEPSEEK, 1024, "w8a16", None),  # arithmetic sets it
        (DEEPSEEK, 8192, "w8a8", 9621),  # 600 TFLOP/s
        (DEEPSEEK, 77, "bf16", None),
    ],
)
def test_what_must_be_reached(shard: object, tokens: int, weights: str, must: float | None) -> None:
    floor = floor_us(shard, tokens, 8, weights)  # type: ignore[arg-type]

    found = required_us(shard, tokens, weights, floor, 690.0)  # type: ignore[arg-type]

    assert found == (None if must is None else pytest.approx(must, rel=0.001))


def test_another_chip_has_floors_of_its_own_and_nothing_to_reach_in_bf16() -> None:
    chip = Chip(bytes_per_s=3.0e12, flops_per_s=800e12)

    floor = floor_us(DEEPSEEK, 16, 8, "bf16", chip)

    assert floor == (pytest.approx(235, rel=0.01), "memory")
    assert required_us(DEEPSEEK, 16, "bf16", floor, 300.0, chip) is None
    assert required_us(DEEPSEEK, 16, "w8a16", (118.0, "memory"), 300.0, chip) == 180.0


def test_every_shard_has_a_requirement_for_every_number_of_tokens() -> None:
    assert [len(shard.required_us) for shard in SHARDS] == [len(TOKENS)] * 4


def test_a_side_that_could_not_be_captured_has_its_eager_time() -> None:
    times = {"a eager": 5.0, "a graph": 4.0, "a compiled eager": 1.0}

    assert fastest(times, "a") == 4.0
    assert fastest(times, "a compiled") == 1.0


def test_sides_take_turns_and_times_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def timed(run: Callable[[], None]) -> float:
        run()
        return 12.0 * len(calls)

    monkeypatch.setattr("benchmarks.gpu_timing._event_us", timed)
    sides = Sides(rounds=2)
    for name, count in (("a", 1), ("b", 2)):
        sides.add_eager(name, [lambda name=name: calls.append(name)] * count)  # type: ignore[misc]

    medians = sides.medians_us()

    assert calls == ["a", "b", "b"] * 3  # the first round warms up
    assert medians == {"a": 12.0 * (4 + 7) / 2, "b": 12.0 * (6 + 9) / 2 / 2}
