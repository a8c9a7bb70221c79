"""How jobs on blocks of matrices are divided among threads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expert_service.kernels.cpu.block_product import BlockProduct
from expert_service.kernels.cpu.sharing import cost_of, cut, share

_JOBS = st.lists(
    st.builds(
        lambda rows, blocks, groups: BlockProduct(0, rows, 1, 2, 0, blocks, groups, 3, 4),
        st.integers(1, 96),
        st.integers(1, 40),
        st.sampled_from([32, 704, 1024]),
    ),
    min_size=1,
    max_size=30,
)


def _block_cost(job: BlockProduct) -> float:
    return cost_of(job) / (job.stop - job.first)


@given(jobs=_JOBS, parts=st.integers(1, 16))
def test_every_block_of_every_job_is_in_one_run_in_its_order(
    jobs: list[BlockProduct], parts: int
) -> None:
    runs = cut(jobs, parts)

    blocks = [(job.rows, block) for job in jobs for block in range(job.stop)]
    assert [(j.rows, b) for run in runs for j in run for b in range(j.first, j.stop)] == blocks
    assert len(runs) <= parts
    assert all(runs)


@given(jobs=_JOBS, parts=st.integers(1, 16))
def test_no_run_is_dearer_than_its_share_by_more_than_a_block(
    jobs: list[BlockProduct], parts: int
) -> None:
    runs = cut(jobs, parts)

    share_cost = sum(map(cost_of, jobs)) / parts
    assert max(sum(map(cost_of, run)) for run in runs) <= share_cost + max(map(_block_cost, jobs))


@given(
    costs=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=50),
    parts=st.integers(1, 16),
    tolerance=st.floats(0.0, 100.0),
)
def test_whole_works_are_shared_in_their_order_or_not_at_all(
    costs: list[float], parts: int, tolerance: float
) -> None:
    spans = share(costs, parts, tolerance)

    if spans is None:
        return
    assert [cost for span in spans for cost in costs[span]] == costs
    assert 1 <= len(spans) <= parts
    assert all(costs[span] for span in spans)
    if parts > 1:
        dearest = max(sum(costs[span]) for span in spans)
        assert dearest <= sum(costs) / parts + tolerance + 1e-6


def test_equal_works_are_shared_evenly_and_one_is_not_shared() -> None:
    assert share([1.0] * 6, 2, 0.0) == [slice(0, 3), slice(3, 6)]
    assert share([1.0] * 3, 2, 0.4) is None
    assert share([1.0] * 3, 2, 0.6) == [slice(0, 1), slice(1, 3)]
    assert share([5.0], 1, 0.0) == [slice(0, 1)]
