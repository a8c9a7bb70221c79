"""What benchmarks share: nothing is printed of sides that disagree, and ratios are right."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    Interval,
    Report,
    Spread,
    WrongOutputError,
    interleave,
    quantile,
    ratios,
    relative_error,
)
from benchmarks.layer import QUICK, make_block, save_block
from expertmesh.checkpoint import Checkpoint
from expertmesh.model import Slot


@pytest.fixture
def report() -> Report:
    return Report("theme", "Title", "python bench.py", "It shows nothing.", facts={"cores": 2})


def test_equal_outputs_pass_the_gate_and_may_be_timed(report: Report) -> None:
    report.gate("T = 1", torch.ones(2, 3), torch.ones(2, 3), 1e-5)

    report.add("T = 1", ms=1.5)

    assert report.table().splitlines() == [
        "| case | ms | error |",
        "| --- | --- | --- |",
        "| T = 1 | 1.5 | 0.0e+00 |",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(torch.full((64, 3), 1.1), id="all rows"),
        pytest.param(torch.cat([torch.full((1, 3), 1.1), torch.ones(63, 3)]), id="one row"),
        pytest.param(torch.full((64, 3), float("nan")), id="nan"),
        pytest.param(torch.ones(63, 3), id="shape"),
        pytest.param(torch.ones(64, 3).double(), id="dtype"),
    ],
)
def test_wrong_outputs_stop_the_report(report: Report, wrong: torch.Tensor) -> None:
    with pytest.raises(WrongOutputError):
        report.gate("T = 64", wrong, torch.ones(64, 3), 2e-2)

    with pytest.raises(WrongOutputError, match="not checked"):
        report.add("T = 64", ms=1.5)
    with pytest.raises(WrongOutputError):
        report.markdown()


def test_a_case_reports_the_largest_error_of_its_sides(report: Report) -> None:
    for value in (1.001, 1.004, 1.002):
        report.gate("T = 1", torch.full((1, 4), value), torch.ones(1, 4), 1e-2)

    report.add("T = 1")

    assert report.rows == [{"case": "T = 1", "error": "4.0e-03"}]


def test_relative_error_is_of_the_whole_and_of_the_worst_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    actual = torch.tensor([[3.0, 4.5], [0.0, 12.0]])

    assert relative_error(actual, expected) == pytest.approx((0.5 / 13, 0.1))


def test_variants_take_turns_to_be_first_after_the_warm_up() -> None:
    calls: list[tuple[str, int]] = []

    seconds = interleave(
        {name: lambda index, name=name: calls.append((name, index)) for name in "AB"},
        rounds=2,
        warmup=1,
    )

    assert calls == [("B", -1), ("A", -1), ("A", 0), ("B", 0), ("B", 1), ("A", 1)]
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_a_median_lies_in_its_interval_nineteen_times_of_twenty() -> None:
    draws = torch.Generator().manual_seed(0)
    found = [Interval.of(torch.randn(25, generator=draws).tolist()) for _ in range(1000)]

    held = sum(each.low <= 0.0 <= each.high for each in found)

    assert 945 <= held <= 975, "95.7 % of samples of 25"
    assert Interval.of([3, 1, 2, 6, 5, 4]) == Interval(1, 3.5, 6)
    with pytest.raises(ValueError, match="at least 6"):
        Interval.of([1.0] * 5)


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([2.0, 30.0, 4.0], [1.0, 10.0, 8.0]) == Spread(min=0.5, median=2.0, max=3.0)


def test_ratios_of_unequal_numbers_of_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_quantiles_are_of_the_sample() -> None:
    values = [float(value) for value in range(100, 0, -1)]

    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7.0], 0.99)) == (51, 100, 7)


def test_results_are_named_by_theme_hardware_and_month(report: Report, tmp_path: Path) -> None:
    report.gate("T = 1", torch.ones(1), torch.ones(1), 1e-5)
    report.add("T = 1", ratio=Spread(0.5, 1.0, 2.0))

    path = report.write("2core-epyc", tmp_path)

    assert path.name == f"theme_2core-epyc_{datetime.date.today():%Y%m}"
    assert "| T = 1 | 1.00 (0.50–2.00) | 0.0e+00 |" in path.with_suffix(".md").read_text()
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "theme": "theme",
        "command": "python bench.py",
        "facts": {"cores": 2},
        "rows": [
            {
                "case": "T = 1",
                "ratio": {"min": 0.5, "median": 1.0, "max": 2.0},
                "error": "0.0e+00",
            }
        ],
    }


@pytest.mark.parametrize("hardware", ["", "my.host.example", "../elsewhere", "Host"])
def test_hardware_is_a_plain_name(report: Report, hardware: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hardware"):
        report.write(hardware, tmp_path)


def test_the_layer_is_saved_as_it_is(tmp_path: Path) -> None:
    block = make_block(QUICK)

    save_block(block, tmp_path)

    with Checkpoint.open(tmp_path) as checkpoint:
        experts, shared = checkpoint.read_expert(Slot(0, 5)), checkpoint.read_expert(Slot(0, 8))
        gate = checkpoint.read_gate(0)
    gate_up = torch.cat([experts.gate, experts.up])
    assert torch.equal(gate_up, block.experts.gate_up_proj[5])
    assert torch.equal(experts.down, block.experts.down_proj[5])
    assert torch.equal(shared.up, block.shared_experts.up_proj.weight)
    assert torch.equal(gate.weight, block.gate.weight.float())
