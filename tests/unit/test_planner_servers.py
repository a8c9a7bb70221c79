"""Servers as the planner sees them: their room, and whether their nodes matter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expertmesh.errors import ConfigError
from load_controller.planner_servers import Server, site_of

LOAD = np.array([[1.0, 1.0, 9.0, 9.0, 2.0, 2.0, 1.0, 1.0]])


def _pairs(**options: object) -> list[Server]:
    """Two servers on each of two nodes."""
    return [Server(name=name, node=name[0], **options) for name in ("b0", "a0", "b1", "a1")]  # type: ignore[arg-type]


def test_without_groups_every_server_may_hold_every_expert() -> None:
    servers = [Server(name="x", node="a", rate=2), Server(name="y", node="b", rate=1, capacity=4)]

    site, slots = site_of(np.ones((2, 5)), servers, 2, None)

    assert slots.tolist() == [7]
    assert site.rate.tolist() == [2.0, 1.0]
    assert (site.rate.dtype, site.capacity.dtype, slots.dtype) == (np.float64, np.int64, np.int64)
    assert site.capacity.tolist() == [4, 4]  # half of seven slots, rounded up
    assert site.node.tolist() == [0, 0]
    assert site.home.tolist() == [[0] * 5] * 2
    assert site.run == 5
    assert site.weighted


def test_groups_that_divide_among_nodes_get_a_home_and_nodes_equal_parts() -> None:
    site, slots = site_of(LOAD, _pairs(), 2, 4)

    assert slots.tolist() == [5, 5]
    assert site.node.tolist() == [1, 0, 1, 0]  # in the order of their names
    assert site.capacity.tolist() == [3, 3, 3, 3]  # half of five, rounded up
    assert site.home.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]  # 18 to one, then 4, 2 and 2
    assert site.rate.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert (site.run, type(site.run)) == (2, int)


def test_the_faster_node_gets_the_heavier_groups() -> None:
    servers = [Server(name=f"{n}", node=f"{n % 2}", rate=1.0 + 4 * (n % 2)) for n in range(4)]

    site, _ = site_of(LOAD, servers, 0, 4)

    assert site.home[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("redundant", "groups", "capacity"),
    [(0, 1, None), (1, 4, None), (0, 4, 1), (4, 8, 3)],
    ids=["fewer groups than nodes", "an odd slot", "a node without room", "a node with too little"],
)
def test_nodes_do_not_matter_where_something_does_not_divide(
    redundant: int, groups: int, capacity: int | None
) -> None:
    servers = [*_pairs()[:3], Server(name="a1", node="a", capacity=capacity)]
    if capacity is not None:
        servers[0] = Server(name="b0", node="b", capacity=8)
        servers[1] = Server(name="a0", node="a", capacity=2)
        servers[2] = Server(name="b1", node="b", capacity=8)

    site, slots = site_of(LOAD, servers, redundant, groups)

    assert slots.tolist() == [8 + redundant]
    assert site.node.tolist() == [0, 0, 0, 0]
    assert (site.home == 0).all()
    assert site.run == 8


def test_a_node_may_have_just_the_room_that_it_needs() -> None:
    """Two servers of a node hold its four experts once each, and no expert twice."""
    site, slots = site_of(LOAD, _pairs(capacity=2), 0, 4)
    with_copies, more_slots = site_of(LOAD, _pairs(capacity=9), 8, 4)

    assert (site.node.max(), slots.tolist()) == (1, [4, 4])
    assert (with_copies.node.max(), more_slots.tolist()) == (1, [8, 8])


def test_slots_may_fill_the_servers_and_no_server_counts_for_more_than_all_experts() -> None:
    servers = [Server(name="a", capacity=3), Server(name="b", capacity=99)]

    site, slots = site_of(np.ones((1, 4)), servers, 3, None)

    assert (site.capacity.tolist(), slots.tolist()) == ([3, 99], [7])
    with pytest.raises(
        ConfigError, match="4 experts and 4 redundant slots a layer do not fit the 7"
    ):
        site_of(np.ones((1, 4)), servers, 4, None)


def test_a_server_without_room_is_no_error_where_others_have_it() -> None:
    servers = [Server(name="a", capacity=0), Server(name="b", capacity=2)]

    assert site_of(np.ones((1, 2)), servers, 0, None)[0].capacity.tolist() == [0, 2]


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide_the_experts_are_refused_where_there_are_nodes(
    groups: int,
) -> None:
    with pytest.raises(ConfigError, match=f"8 experts do not divide into {groups} groups"):
        site_of(LOAD, _pairs(), 0, groups)
    assert site_of(LOAD, [Server(name="alone")], 0, groups)[0].run == 8


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_no_speed_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=f"server b has rate {rate}"):
        site_of(LOAD, [Server(name="a"), Server(name="b", rate=rate)], 0, None)
