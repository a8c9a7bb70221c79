"""What two looks at a cluster say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmesh.info import MeshLoad
from expertmesh.v1 import router_pb2 as pb
from fleet.top import Look, compare


def _load(*counts: int, layer: int = 1) -> MeshLoad:
    return MeshLoad(
        counts={layer: torch.tensor(counts)},
        router_gated={},
        maxvio={},
        bias_version=3,
        epoch=2,
        window_maxvio={layer: 0.5},
        divergence={layer: 0.02},
        max_abs_delta={layer: 0.1},
    )


def _router(alive: bool = True, **rows: int) -> pb.GetStatusResponse:
    servers = [
        pb.ServerStatus(
            server_id=name, state="ready", connected=True, requests_in_flight=2, answered_rows=count
        )
        for name, count in rows.items()
    ]
    return pb.GetStatusResponse(
        balance_mode="adaptive", balance_alive=alive, controller_connected=True, servers=servers
    )


BEFORE = Look(10.0, _load(100, 0, 0, 0), [_router(s0=50, s1=7)])


def test_a_layers_violation_and_extremes_are_of_what_came_between_the_looks() -> None:
    after = Look(12.0, _load(102, 10, 4, 4), [_router(s0=50, s1=7)])

    (row,) = compare(BEFORE, after).layers

    assert (row.hottest, row.coldest) == (1, 0)
    assert (row.hottest_share, row.coldest_share) == (0.5, 0.1)
    assert row.max_violation == 1.0
    assert row.assignments_per_s == 10.0
    assert (row.window_max_violation, row.divergence, row.max_abs_delta) == (0.5, 0.02, 0.1)


def test_a_quiet_layer_shows_what_has_been_counted_since_the_start() -> None:
    (row,) = compare(BEFORE, replace(BEFORE, at_s=12.0)).layers

    assert (row.hottest, row.max_violation, row.assignments_per_s) == (0, 3.0, 0.0)


def test_a_layer_without_any_traffic_is_even() -> None:
    empty = Look(10.0, _load(0, 0, 0, 0), [_router()])

    (row,) = compare(empty, replace(empty, at_s=11.0)).layers

    assert (row.max_violation, row.hottest_share) == (0.0, 0.0)


def test_a_servers_rows_and_queue_are_summed_over_routers() -> None:
    before = Look(0.0, _load(0), [_router(s0=100), _router(s0=10)])
    after = Look(2.0, _load(0), [_router(s0=130), _router(s0=20)])

    (row,) = compare(before, after).servers

    assert (row.rows_per_s, row.requests_in_flight) == (20.0, 4)


def test_a_server_that_has_just_come_and_a_router_that_restarted_have_no_negative_rate() -> None:
    after = Look(11.0, _load(100, 0, 0, 0), [_router(s0=3, new=8)])

    rates = {row.server_id: row.rows_per_s for row in compare(BEFORE, after).servers}

    assert rates == {"new": 0.0, "s0": 0.0}


@pytest.mark.parametrize("alive", [True, False])
def test_balancing_is_alive_when_every_router_hears_it(alive: bool) -> None:
    after = Look(11.0, _load(0), [_router(), _router(alive=alive)])

    assert compare(BEFORE, after).balance_alive is alive
