"""Experts move between running servers while requests go on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import expertmesh
from expert_service.server import ExpertServer
from expertmesh.model import ExpertWeights, Slot
from expertmesh.rpc import loop
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import control_pb2_grpc
from load_controller import mover
from load_controller.migration import Copy
from tests.checkpoints import make_checkpoint
from tests.load import Load
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.wire import details

LAYER = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("checkpoint")
    return path, make_checkpoint("deepseek_v3", path)


@pytest.fixture
def mesh(checkpoint: tuple[Path, torch.nn.Module]) -> Iterator[LocalMesh]:
    with local_mesh(checkpoint[0], shards=2, routers=2) as cluster:
        yield cluster


def _held(server: ExpertServer, layer: int = LAYER) -> set[int]:
    return {slot.expert for slot in server.shard.slots if slot.layer == layer}


def _moves(action: int, server: str, *slots: Slot) -> list[pb.SlotMove]:
    return [
        pb.SlotMove(action=action, layer=slot.layer, expert=slot.expert, server_id=server)  # type: ignore[arg-type]
        for slot in slots
    ]


def _load(server: str, *slots: Slot) -> list[pb.SlotMove]:
    return _moves(pb.MOVE_ACTION_LOAD, server, *slots)


def _drop(server: str, *slots: Slot) -> list[pb.SlotMove]:
    return _moves(pb.MOVE_ACTION_DROP, server, *slots)


def _migrate(cluster: LocalMesh, *moves: list[pb.SlotMove]) -> pb.MigrateSlotsResponse:
    request = pb.MigrateSlotsRequest(moves=[move for group in moves for move in group])
    with grpc.insecure_channel(cluster.controller.address) as channel:
        return control_pb2_grpc.ControlServiceStub(channel).MigrateSlots(request, timeout=30.0)


def _refused(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return details(caught.value)[0], caught.value.details()


def test_experts_change_places_under_load_without_a_failed_or_wrong_answer(
    mesh: LocalMesh, checkpoint: tuple[Path, torch.nn.Module]
) -> None:
    first, second = mesh.servers
    some = [Slot(layer, expert) for layer in (1, 2) for expert in (0, 1)]
    others = [Slot(1, max(_held(second)) - 1), Slot(2, max(_held(second, 2)) - 1)]
    with Load(mesh.address, checkpoint[1], clients=8, rows=4, timeout=20.0) as load:
        load.wait_right(200, 60.0)
        done = _migrate(
            mesh, _load("s1r0", *some), _drop("s0r0", *some),
            _load("s0r0", *others), _drop("s1r0", *others),
        )  # fmt: skip
        load.wait_right(200, 60.0)
        epochs = {router.router.snapshot.slots.epoch for router in mesh.routers}

    assert load.outcome.wrong == []
    assert load.outcome.errors == []
    assert (done.loaded, done.dropped) == (6, 6)
    assert min(epochs) >= done.epoch
    assert {Slot(1, e) for e in _held(second)} >= set(some[:2])
    assert not {Slot(1, e) for e in _held(first)} & set(some)
    assert not set(second.shard.slots) & set(others)


def test_ids_and_weights_are_the_same_after_a_move_and_outputs_within_rounding(
    mesh: LocalMesh,
) -> None:
    with expertmesh.connect(mesh.address) as client:
        hidden = torch.randn(40, client.describe().hidden_size)
        before = client.forward(hidden, LAYER)
        counts = client.load().counts[LAYER]
        _migrate(mesh, _load("s1r0", Slot(LAYER, 0)), _drop("s0r0", Slot(LAYER, 0)))
        after = client.forward(hidden, LAYER)
        counts_after = client.load().counts[LAYER] - counts

    assert (after - before).norm() <= 1e-6 * before.norm()
    assert torch.equal(counts, counts_after)


def test_a_replica_of_one_expert_takes_a_part_of_its_rows(mesh: LocalMesh) -> None:
    second = mesh.servers[1]
    _migrate(mesh, _load("s1r0", Slot(LAYER, 0)))
    with expertmesh.connect(mesh.address) as client:
        hidden = torch.randn(64, client.describe().hidden_size)
        ids = torch.zeros(64, 1, dtype=torch.int32)
        for _ in range(20):
            client.forward(hidden, LAYER, expert_ids=ids, expert_weights=torch.ones(64, 1))

    executed = [int(s.shard._layers[LAYER].counts_E[0]) for s in mesh.servers]
    assert sum(executed) == 20 * 64
    assert 0 in _held(second)
    assert min(executed) > 0


def test_a_copy_with_another_digest_is_undone_and_named(
    mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = mesh.servers[1]
    read = second._mover._read_expert

    def spoiled(slot: Slot, pause: Callable[[], None]) -> ExpertWeights:
        weights = read(slot, pause)
        return ExpertWeights(weights.gate + 1e-3, weights.up, weights.down)

    monkeypatch.setattr(second._mover, "_read_expert", spoiled)
    epoch = mesh.controller.controller.epoch

    reason, said = _refused(lambda: _migrate(mesh, _load("s1r0", Slot(LAYER, 0))))

    assert reason == "FLEET_MISMATCH"
    assert "expert 0 of layer 1 has digest" in said
    wait_until(lambda: 0 not in _held(second), 5.0, "dropped again")
    wait_until(lambda: not mesh.controller.controller.leaving(), 5.0, "forgotten")
    assert mesh.controller.controller.epoch >= epoch
    with expertmesh.connect(mesh.address) as client:
        assert client.status().ready


def test_a_server_that_fails_in_the_middle_leaves_every_layer_as_it_was(
    mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = mesh.servers[1]
    read, calls = second._mover._read_expert, []

    def fails_at_the_second(slot: Slot, pause: Callable[[], None]) -> ExpertWeights:
        calls.append(slot)
        if len(calls) == 2:
            raise expertmesh.CheckpointError("the disk has gone")
        return read(slot, pause)  # type: ignore[return-value]

    monkeypatch.setattr(second._mover, "_read_expert", fails_at_the_second)
    before = _held(second)

    slots = Slot(LAYER, 0), Slot(LAYER, 1)
    reason, said = _refused(lambda: _migrate(mesh, _load("s1r0", *slots)))

    assert (reason, said) == ("UNAVAILABLE", "s1r0: the disk has gone")
    assert len(calls) == 2
    assert _held(second) == before
    with expertmesh.connect(mesh.address) as client:
        assert client.status().ready


def test_slots_that_do_not_fit_are_refused_with_the_arithmetic(
    mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh.servers[1]._mover, "_free_bytes", lambda: 100 << 20)

    reason, said = _refused(lambda: _migrate(mesh, _load("s1r0", Slot(LAYER, 0))))

    assert reason == "NO_ROOM"
    assert "100 MiB are free on this host" in said


def test_a_second_migration_is_told_to_wait(mesh: LocalMesh) -> None:
    mesh.controller._mover._busy = True

    reason, said = _refused(lambda: _migrate(mesh, _load("s1r0", Slot(LAYER, 0))))

    assert reason == "MIGRATING"
    assert "wait for it to end" in said


def test_an_impossible_move_is_refused_and_nothing_is_done(mesh: LocalMesh) -> None:
    reason, said = _refused(lambda: _migrate(mesh, _drop("s0r0", Slot(LAYER, 0))))

    assert reason == "INVALID_REQUEST"
    assert "without a server" in said
    assert 0 in _held(mesh.servers[0])


def test_a_restarted_server_holds_what_it_held_and_not_what_it_was_started_with(
    mesh: LocalMesh,
) -> None:
    _migrate(mesh, _load("s1r0", Slot(LAYER, 0)), _drop("s0r0", Slot(LAYER, 0)))
    loop.run(mesh.servers[1].stop())
    again = mesh.start_server("s1r0", 1, 2)
    wait_until(lambda: again.state == "ready", 20.0, "ready")
    mesh.wait()

    assert 0 in _held(again)
    with expertmesh.connect(mesh.address) as client:
        hidden = torch.randn(8, client.describe().hidden_size)
        client.forward(hidden, LAYER)


def test_a_controller_that_ends_in_mid_step_drops_what_was_loaded_and_not_shown(
    mesh: LocalMesh,
) -> None:
    slot = Slot(LAYER, 0)
    controller = mesh.controller.controller
    # What a step does before the switch.
    controller.expect([Copy("s1r0", slot)])
    loop.run(mesh.servers[1].load_slots([slot]))
    loop.run(mesh.controller.stop())
    mesh.controller = mesh.start_controller(mesh.state)

    wait_until(lambda: 0 not in _held(mesh.servers[1]), 20.0, "dropped")
    wait_until(lambda: not mesh.controller.controller.leaving(), 20.0, "forgotten")
    mesh.wait()


def test_old_slots_stay_while_a_router_is_cut_off_and_go_when_it_is_back(
    mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "_SWITCH_S", 0.2)
    controller = mesh.controller.controller
    router = controller._routers["router-1"]
    controller.remove_router("router-1", router.incarnation, time.monotonic())

    _migrate(mesh, _load("s1r0", Slot(LAYER, 0)), _drop("s0r0", Slot(LAYER, 0)))
    kept = _held(mesh.servers[0])
    controller._away.clear()  # as when it watches again, and has told what it uses
    controller._routers["router-1"] = replace(router, epoch=controller.epoch)

    assert 0 in kept
    wait_until(lambda: 0 not in _held(mesh.servers[0]), 10.0, "dropped")


def test_a_load_that_is_given_up_while_the_device_takes_a_slot_leaves_none(mesh: LocalMesh) -> None:
    server, slots = mesh.servers[1], [Slot(LAYER, 0), Slot(LAYER, 1)]
    before, added = _held(server), threading.Event()

    async def give_up() -> None:
        gate = threading.Event()
        blocked = asyncio.ensure_future(server._runner.call(gate.wait))
        await asyncio.sleep(0)  # the device has been told to wait
        submit = server._runner._submit

        def note(work: Any) -> None:
            submit(work)
            added.set()

        server._runner._submit = note  # type: ignore[method-assign]
        loading = asyncio.ensure_future(server._mover.load(slots))
        await asyncio.to_thread(added.wait, 10.0)  # the first slot waits for the device
        loading.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait((blocked, loading))
        assert loading.cancelled()
        await server._runner.call(lambda: None)  # whatever waited for the device is done

    loop.run(give_up())

    assert added.is_set()
    assert _held(server) == before
