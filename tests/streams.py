"""A cluster in which nothing stays in flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh
from tests.wire import wait_until_idle


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    with local_mesh(path, backend="reference") as cluster:
        cluster.model = model
        yield cluster


@pytest.fixture(autouse=True)
def nothing_stays_in_flight(mesh: LocalMesh) -> Iterator[None]:
    yield
    wait_until_idle(mesh)
