"""What a delta would change, and how it is cut, on written-out scores."""

from __future__ import annotations

import pytest
import torch

from expertmesh import gating
from expertmesh.model import GateSpec
from load_controller.divergence import (
    MIN_ROWS,
    Candidate,
    Gate,
    HeldSamples,
    Sample,
    Share,
    _batches,
    judge,
    judge_all,
    own_choices,
)

SPEC = GateSpec(score="sigmoid", top_k=1)
GATE = Gate(SPEC, torch.tensor([0.0, 0.1]))


def _rows(*gaps: float) -> torch.Tensor:
    """Rows of two experts: score of the second 0.4, of the first `gap` above the frozen tie."""
    return torch.tensor([[0.5 + gap, 0.4] for gap in gaps])


def _even(rows: int) -> torch.Tensor:
    """Gaps spread evenly over (0, 1): a delta of d on the second expert changes a share d."""
    return _rows(*((torch.arange(rows) + 0.5) / rows).tolist())


def test_divergence_is_the_share_of_picks_that_the_trained_bias_would_not_make() -> None:
    scores = _rows(0.3, 0.1, -0.1, 0.05)

    share = Sample(scores).divergence(torch.tensor([0.0, 0.2]), GATE)

    assert share == Share(changed=2, picks=4)


def test_a_delta_of_zero_diverges_nowhere_ties_included() -> None:
    assert Sample(_rows(0.0, 0.0, 0.5)).divergence(torch.zeros(2), GATE).changed == 0


def test_the_gates_groups_count_when_picks_are_compared() -> None:
    spec = GateSpec(score="sigmoid", top_k=1, n_group=2, topk_group=1, group_score="top2_sum")
    gate = Gate(spec, torch.zeros(4))
    sample = Sample(torch.tensor([[0.6, 0.3, 0.8, 0.0]]))  # groups are worth 0.9 and 0.8

    kept = sample.divergence(torch.tensor([0.0, 0.0, 0.05, 0.0]), gate)
    moved = sample.divergence(torch.tensor([0.0, 0.0, 0.2, 0.0]), gate)

    assert (kept.changed, moved.changed) == (0, 1)


def test_a_share_is_known_to_two_standard_errors() -> None:
    shares = [Share(20, 100), Share(50, 100), Share(0, 100), Share(0, 0)]

    assert [share.value for share in shares] == [0.2, 0.5, 0.0, 0.0]
    assert [share.upper for share in shares] == pytest.approx([0.28, 0.6, 0.0, 0.0])


def test_a_share_exactly_at_the_ceiling_is_admitted_at_once_or_after_a_halving() -> None:
    """A delta of 0.05 changes 20 of 100 picks, one of 0.1 changes 40."""
    sample = Sample(_rows(*[0.03] * 20, *[0.08] * 20, *[0.5] * 60))
    ceiling = Share(20, 100).upper

    at_once = judge(torch.tensor([0.0, 0.05]), GATE, [sample], ceiling)
    later = judge(torch.tensor([0.0, 0.1]), GATE, [sample], ceiling)

    assert (at_once.share, at_once.halvings) == (Share(20, 100), 0)
    assert (later.share, later.halvings) == (Share(40, 100), 1)
    assert later.delta.tolist() == pytest.approx([0.0, 0.05])


def test_the_larger_share_decides_and_not_the_larger_number() -> None:
    many = Sample(_rows(*[0.05] * 30, *[0.5] * 970))
    few = Sample(_rows(*[0.05] * 20, *[0.5] * 80))

    for samples in ([many, few], [few, many]):
        assert judge(torch.tensor([0.0, 0.1]), GATE, samples, 1.0).share == Share(20, 100)


def test_a_candidate_under_the_ceiling_is_admitted_as_it_is() -> None:
    candidate = torch.tensor([0.0, 0.04])

    verdict = judge(candidate, GATE, [Sample(_even(1000))], ceiling=0.1)

    assert torch.equal(verdict.delta, candidate)
    assert (verdict.halvings, verdict.withdrawn) == (0, False)


def test_a_candidate_above_the_ceiling_is_halved_until_it_is_under_it() -> None:
    candidate = torch.tensor([0.0, 0.15])

    verdict = judge(candidate, GATE, [Sample(_even(1000))], ceiling=0.1)

    assert verdict.delta.tolist() == pytest.approx([0.0, 0.075])
    assert (verdict.halvings, verdict.withdrawn) == (1, False)
    assert candidate.tolist() == pytest.approx([0.0, 0.15])


@pytest.mark.parametrize("shift", [0.2, 0.9], ids=["twice the ceiling", "far above"])
def test_a_candidate_at_twice_the_ceiling_is_withdrawn(shift: float) -> None:
    verdict = judge(torch.tensor([0.0, shift]), GATE, [Sample(_even(1000))], ceiling=0.1)

    assert verdict.delta.tolist() == [0.0, 0.0]
    assert (verdict.halvings, verdict.withdrawn) == (0, True)


def test_a_delta_that_no_halving_brings_under_the_ceiling_ends_at_zero() -> None:
    cliff = torch.cat((_rows(*[1e-9] * 150), _rows(*[0.5] * 850)))

    verdict = judge(torch.tensor([0.0, 0.1]), GATE, [Sample(cliff)], ceiling=0.1)

    assert verdict.delta.tolist() == [0.0, 0.0]
    assert not verdict.withdrawn


def test_a_small_sample_admits_less_than_a_large_one() -> None:
    candidate = torch.tensor([0.0, 0.09])

    small = judge(candidate, GATE, [Sample(_even(100))], ceiling=0.1)
    large = judge(candidate, GATE, [Sample(_even(100_000))], ceiling=0.1)

    assert (small.halvings, large.halvings) == (1, 0)


def test_the_router_whose_traffic_diverges_most_decides() -> None:
    calm = _rows(*[0.5] * 1000)

    verdict = judge(
        torch.tensor([0.0, 0.15]), GATE, [Sample(calm), Sample(_even(1000))], ceiling=0.1
    )

    assert verdict.halvings == 1


def test_nothing_is_admitted_without_a_sample() -> None:
    with pytest.raises(ValueError, match="without a sample"):
        judge(torch.zeros(2), GATE, [], ceiling=0.1)


def test_the_trained_bias_is_never_written() -> None:
    gate = Gate(SPEC, torch.tensor([0.0, 0.1]))

    judge(torch.tensor([0.0, 0.9]), gate, [Sample(_even(100))], ceiling=0.1)

    assert torch.equal(gate.trained_bias, torch.tensor([0.0, 0.1]))


def test_a_full_report_replaces_the_rows_that_were_held() -> None:
    held = HeldSamples(stale_s=10.0)
    held.add("r0", _rows(*[0.1] * MIN_ROWS), now=0.0)
    held.add("r0", _rows(*[0.2] * (MIN_ROWS + 3)), now=1.0)

    (rows,) = held.usable()

    assert torch.equal(rows.scores_TE, _rows(*[0.2] * (MIN_ROWS + 3)))


def test_a_small_report_is_filled_up_with_older_rows() -> None:
    held = HeldSamples(stale_s=10.0)
    held.add("r0", _rows(*[0.1] * MIN_ROWS), now=0.0)
    held.add("r0", _rows(0.2, 0.2), now=1.0)

    (rows,) = held.usable()

    assert torch.equal(rows.scores_TE, _rows(*[0.1] * (MIN_ROWS - 2), 0.2, 0.2))


def test_rows_judge_only_when_they_are_enough() -> None:
    held = HeldSamples(stale_s=10.0)
    held.add("r0", _even(MIN_ROWS - 1), now=0.0)
    few = held.usable()
    held.add("r0", _even(1), now=0.0)

    assert few == []
    assert len(held.usable()) == 1


def test_a_router_that_is_gone_or_serves_nothing_judges_no_more() -> None:
    held = HeldSamples(stale_s=10.0)
    for name, at in (("gone", 20.0), ("idle", 5.0), ("busy", 20.0)):
        held.add(name, _even(MIN_ROWS), now=at)
    held.drop("gone")

    assert len(held.usable()) == 1


def test_rows_are_stale_once_they_are_older_than_they_may_be() -> None:
    held = HeldSamples(stale_s=10.0)
    for name, at in (("old", 9.9), ("just in time", 10.0), ("newest", 20.0)):
        held.add(name, _even(MIN_ROWS), now=at)

    assert len(held.usable()) == 2


def test_nothing_held_judges_nothing_and_a_router_that_sent_none_can_go() -> None:
    held = HeldSamples(stale_s=10.0)

    held.drop("never heard of")

    assert held.usable() == []


@pytest.mark.parametrize("first", [True, False], ids=["of the held rows", "of the new ones"])
def test_rows_whose_choice_is_known_only_in_part_choose_again(first: bool) -> None:
    held, reports = HeldSamples(stale_s=10.0), (_even(MIN_ROWS), _rows(-0.2, 0.01))
    for number, rows in enumerate(reports):
        known = own_choices([(rows, GATE)])[0] if first == (number == 0) else None
        held.add("r0", rows, 0.0, known)
    (sample,) = held.usable()

    share = sample.divergence(torch.tensor([0.0, 0.1]), GATE)

    assert share == Sample(sample.scores_TE).divergence(torch.tensor([0.0, 0.1]), GATE)


@pytest.mark.parametrize(
    "spec",
    [
        GateSpec(score="sigmoid", top_k=3),
        GateSpec(score="sigmoid", top_k=3, n_group=4, topk_group=2, group_score="top2_sum"),
        GateSpec(score="softmax", top_k=16),
    ],
    ids=["plain", "in groups", "every expert"],
)
def test_many_samples_at_a_time_diverge_as_row_by_row(spec: GateSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 64, 300, 400, 7]
    # On a coarse grid: many rows have ties, at the boundary too.
    samples = [torch.randint(0, 12, (rows, 16), generator=generator) / 12 for rows in sizes]
    gates = [Gate(spec, torch.randint(0, 3, (16,), generator=generator) / 12) for _ in sizes]
    deltas = [torch.randint(-2, 3, (16,), generator=generator) / 12 for _ in sizes]
    owns = own_choices(list(zip(samples, gates, strict=True)))

    verdicts = judge_all(
        [
            Candidate(delta, gate, [Sample(scores, own)])
            for scores, gate, delta, own in zip(samples, gates, deltas, owns, strict=True)
        ],
        ceiling=1.0,
    )

    for scores, gate, delta, verdict in zip(samples, gates, deltas, verdicts, strict=True):
        changed = 0
        for row in scores:
            own = set(gating.choose(row[None], spec, gate.trained_bias)[0].tolist())
            new = set(gating.choose(row[None], spec, gate.trained_bias + delta)[0].tolist())
            changed += len(new - own)
        assert verdict.share == Share(changed, len(scores) * spec.top_k)


def test_each_of_many_layers_is_cut_as_if_it_were_alone() -> None:
    candidates = [
        Candidate(torch.tensor([0.0, shift]), GATE, [Sample(_even(rows)), Sample(_even(100))])
        for shift, rows in [(0.02, 900), (0.15, 700), (0.9, 64), (0.3, 400), (0.11, 1000)]
    ]

    together = judge_all(candidates, ceiling=0.1)

    for candidate, verdict in zip(candidates, together, strict=True):
        alone = judge(candidate.delta, candidate.gate, candidate.samples, ceiling=0.1)
        assert torch.equal(alone.delta, verdict.delta)
        assert alone[1:] == verdict[1:]
    assert [verdict.withdrawn for verdict in together] == [False, False, True, True, False]


def test_layers_of_other_sizes_and_rules_are_judged_in_one_go_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    candidates = [
        Candidate(
            torch.randn(experts, generator=generator) / 10,
            Gate(GateSpec(score="sigmoid", top_k=top_k), torch.zeros(experts)),
            [Sample(torch.rand(70, experts, generator=generator))],
        )
        for experts, top_k in [(8, 1), (8, 2), (8, 2), (6, 2), (8, 2)]
    ]

    together = judge_all(candidates, ceiling=1.0)

    alone = [judge(each.delta, each.gate, each.samples, 1.0).share for each in candidates]
    assert [verdict.share for verdict in together] == alone
    assert [share.picks for share in alone] == [70, 140, 140, 140, 140]


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([], []),
        ([600], [(0, 1)]),
        ([200, 300, 12, 1], [(0, 3), (3, 4)]),
        ([200, 300, 13, 499, 1], [(0, 2), (2, 4), (4, 5)]),
        ([1, 600, 1], [(0, 1), (1, 2), (2, 3)]),
    ],
    ids=str,
)
def test_samples_are_judged_together_up_to_512_rows(
    sizes: list[int], runs: list[tuple[int, int]]
) -> None:
    batches = list(_batches([(torch.zeros(rows, 2), GATE) for rows in sizes]))

    assert [(batch.start, batch.stop) for batch in batches] == runs
    assert [batch.rows for batch in batches] == [sizes[start:stop] for start, stop in runs]
    assert [len(batch.scores) for batch in batches] == [sum(sizes[a:b]) for a, b in runs]


def test_only_rows_that_may_choose_otherwise_choose_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(_rows(0.3, 0.1, -0.4, 0.05, 0.0), own_TE=None)
    sample.own(GATE)
    choose, chosen = gating.choose, []

    def noted(scores: torch.Tensor, spec: GateSpec, bias: torch.Tensor) -> torch.Tensor:
        chosen.append(len(scores))
        return choose(scores, spec, bias)

    monkeypatch.setattr(gating, "choose", noted)

    assert sample.divergence(torch.tensor([0.0, 0.2]), GATE).changed == 3
    assert chosen == [3], "those whose first two are as far apart as the delta, or less"


def test_it_is_judged_on_the_cpu_whatever_the_default_device_is() -> None:
    candidate = Candidate(torch.tensor([0.0, 0.15]), GATE, [Sample(_even(1000))])

    with torch.device("meta"):
        (verdict,) = judge_all([candidate], ceiling=0.1)

    assert (verdict.share, verdict.halvings) == (Share(150, 1000), 1)


def test_own_picks_of_a_small_report_are_kept_with_its_rows() -> None:
    held, gate = HeldSamples(stale_s=10.0), Gate(SPEC, torch.tensor([0.0, 0.1]))
    for report in (_even(MIN_ROWS), _rows(-0.2, 0.3, -0.1), _rows(0.01)):
        held.add("r0", report, 0.0, own_choices([(report, gate)])[0])

    sample = held.usable()[0]

    expected = gating.choice_mask(sample.scores_TE, SPEC, gate.trained_bias)
    assert sample.known_own_TE is not None
    assert torch.equal(sample.known_own_TE, expected)
