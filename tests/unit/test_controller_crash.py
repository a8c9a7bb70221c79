"""A crash before any statement that the controller writes leaves a whole state behind.

The database's files are copied before each statement, as a process killed there would leave them;
every copy is opened as a restarted controller opens it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from expertmesh.config import BalanceConfig
from expertmesh.v1 import control_pb2 as pb
from expertmesh.v1 import router_pb2
from load_controller.controller import LoadController
from load_controller.store import Store

LAYERS = (1, 2, 3)


def _report(sequence: int) -> pb.ReportAssignmentsRequest:
    """Totals that close a window of every layer."""
    layers = [
        router_pb2.LayerLoad(layer=layer, counts=[8 * sequence, sequence * layer], top_k=1)
        for layer in LAYERS
    ]
    return pb.ReportAssignmentsRequest(
        source="r0", incarnation="i", sequence=sequence, layers=layers
    )


def _controller(path: Path) -> tuple[LoadController, Store]:
    store = Store(path)
    balance = BalanceConfig(mode="adaptive", window_tokens=1)
    return LoadController(store, balance, lambda: None), store


def _state(controller: LoadController) -> tuple[bytes, bytes]:
    """Bias and counts, as everybody is told them."""
    load = controller.load(now=0.0)
    counts = pb.GetClusterLoadResponse(layers=[], bias_version=load.bias_version)
    counts.layers.extend(
        router_pb2.LayerLoad(layer=entry.layer, counts=entry.counts) for entry in load.layers
    )
    return controller.bias().SerializeToString(), counts.SerializeToString()


def test_every_crash_image_is_a_state_that_was_published_or_the_next(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    controller, store = _controller(path)
    images: list[tuple[int, Path]] = []
    published = [_state(controller)]

    def crash(_: str) -> None:
        folder = tmp_path / f"image-{len(images)}"
        folder.mkdir()
        for file in tmp_path.glob("state.sqlite*"):
            shutil.copy(file, folder)
        images.append((len(published) - 1, folder / path.name))

    store.file._db.set_trace_callback(crash)
    for sequence in range(1, 4):
        controller.take_assignments(_report(sequence), now=0.0)
        published.append(_state(controller))
    controller.set_mode("", reset=True)
    published.append(_state(controller))
    controller.set_mode("frozen")
    published.append(_state(controller))
    store.file._db.set_trace_callback(None)
    store.close()

    assert len(images) > 30
    found = set()
    for before, image in images:
        restarted, store = _controller(image)
        state = _state(restarted)
        store.close()
        assert state in published[before : before + 2], image.parent.name
        found.add(published.index(state))
    assert found >= {0, 1, 2, 3, 4}
