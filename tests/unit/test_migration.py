"""Which moves are possible, and in which steps; what routers are shown meanwhile."""

from __future__ import annotations

import pytest

from expertmesh.codec.slots import layer_slots
from expertmesh.errors import InvalidRequestError, MismatchError
from expertmesh.model import Slot
from expertmesh.v1 import control_pb2, router_pb2
from load_controller.holdings import Holdings
from load_controller.migration import Copy, Step, by_server, check_digests, plan_steps
from load_controller.store import Store

A, B, C, D = Slot(0, 0), Slot(0, 1), Slot(2, 0), Slot(2, 1)
SHOWN = {"one": frozenset({A, B, C}), "two": frozenset({C, D})}


def test_moves_become_one_step_a_layer_in_ascending_order() -> None:
    steps = plan_steps(
        SHOWN, [Copy("one", D), Copy("two", B)], [Copy("two", D), Copy("one", B), Copy("one", C)]
    )

    assert steps == [
        Step(0, (Copy("two", B),), (Copy("one", B),)),
        Step(2, (Copy("one", D),), (Copy("one", C), Copy("two", D))),
    ]


def test_what_is_so_already_is_left_out() -> None:
    assert plan_steps(SHOWN, [Copy("one", A), Copy("two", C)], [Copy("two", A)]) == []


@pytest.mark.parametrize(
    ("loads", "drops", "said"),
    [
        ([Copy("three", A)], [], "server 'three' is not ready: name one of one, two"),
        ([Copy("one", Slot(9, 9))], [], "no server holds expert 9 of layer 9"),
        ([Copy("two", A)], [Copy("two", A)], "to be loaded and dropped on two"),
        ([], [Copy("one", A)], "leave expert 0 of layer 0 without a server"),
        ([], [Copy("one", C), Copy("two", C)], "leave expert 0 of layer 2 without a server"),
    ],
)
def test_impossible_moves_are_refused_before_anything_is_done(
    loads: list[Copy], drops: list[Copy], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        plan_steps(SHOWN, loads, drops)


def test_copies_are_grouped_by_server() -> None:
    grouped = by_server([Copy("two", B), Copy("one", D), Copy("two", A)])

    assert grouped == {"one": [D], "two": [A, B]}


def test_a_copy_that_differs_from_another_is_found() -> None:
    elsewhere = {A: {"one": "aa", "two": "aa"}, B: {}}
    check_digests({Copy("two", A): "aa", Copy("two", B): "bb"}, elsewhere)

    with pytest.raises(MismatchError, match="expert 0 of layer 0 has digest ff on two and aa on"):
        check_digests({Copy("two", A): "ff"}, elsewhere)


def _announced(
    server: str, slots: set[Slot], initial: set[Slot]
) -> control_pb2.AnnounceServerRequest:
    return control_pb2.AnnounceServerRequest(
        server=router_pb2.ServerStatus(server_id=server),
        layers=layer_slots(slots),
        initial_layers=layer_slots(initial),
    )


def test_a_step_is_seen_as_one_placement() -> None:
    step = Step(0, (Copy("two", A),), (Copy("one", A),))
    one, two = _announced("one", {A, B}, {A, B}), _announced("two", {C}, {C})
    holdings = Holdings()
    holdings.arriving |= set(step.loads)
    two_loaded = _announced("two", {A, C}, {C})

    before = holdings.shown(one), holdings.shown(two_loaded)
    holdings.switch(step)
    after = holdings.shown(one), holdings.shown(two_loaded)

    assert holdings.shown(two) == {C}
    assert before == ({A, B}, {C})
    assert after == ({B}, {A, C})


def test_a_copy_that_has_gone_is_hidden_no_more() -> None:
    holdings = Holdings(leaving={Copy("one", A), Copy("two", A)})

    still = holdings.gone(_announced("one", {A, B}, {A, B}))
    gone = holdings.gone(_announced("one", {B}, {A, B}))

    assert (still, gone) == (set(), {Copy("one", A)})


def test_a_restarted_server_loads_what_it_held_unless_it_is_started_otherwise() -> None:
    holdings = Holdings()
    holdings.assign(_announced("one", {A, C}, {A, B}))

    assert holdings.to_load(_announced("one", {A, B}, {A, B})) == {A, C}
    assert holdings.to_load(_announced("one", {D}, {D})) == frozenset()
    assert holdings.to_load(_announced("two", {A, B}, {A, B})) == frozenset()

    holdings.assign(_announced("one", {A, B}, {A, B}))
    assert holdings.assigned == {}


def test_a_controller_killed_in_mid_step_takes_up_with_copies_that_shall_go(tmp_path) -> None:
    store = Store(tmp_path / "state.sqlite")
    holdings = Holdings(arriving={Copy("two", A)}, leaving={Copy("one", B)})
    holdings.assign(_announced("one", {A, C}, {A, B}))
    store.save_holdings(holdings, epoch=7)
    store.close()

    again = Store(tmp_path / "state.sqlite")
    restored = again.holdings()

    assert restored.arriving == set()
    assert restored.leaving == {Copy("two", A), Copy("one", B)}
    assert restored.assigned == holdings.assigned
    assert again.meta("epoch") == "7"
    again.close()
