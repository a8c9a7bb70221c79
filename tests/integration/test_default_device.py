"""A caller's default device and type change nothing of what travels, or of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import expertmesh
from expertmesh.config import RouterConfig, SharedMemoryConfig
from expertmesh.rpc import loop
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh

H = 64
_TIPPED = {None: 1e-5, "bfloat16": 6e-3, "float8_e4m3fn": 6e-2}
WAYS: dict[str, dict[str, Any]] = {
    "grpc": {"data_connections": "off"},
    "data connection": {},
    "shared memory": {"shared_memory": "auto"},
    "narrow": {"wire_dtype": "bfloat16"},
    "narrower": {"wire_dtype": "float8_e4m3fn"},
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("deepseek_v3", path)
    config = RouterConfig(shared_memory=SharedMemoryConfig(mode="auto"))
    with local_mesh(path, router_config=config) as running:
        running.wait()
        yield running


async def _ask(address: str, hidden: torch.Tensor, options: dict[str, Any]) -> list[torch.Tensor]:
    async with expertmesh.connect_async(address, **options) as mesh:
        load = await mesh.load()
        return [
            await mesh.forward(hidden, 0),
            await mesh.forward(hidden, 1),
            await mesh.forward(hidden[:1], 1),
            await mesh.forward(hidden[:0], 1),
            *load.counts.values(),
        ]


async def _ask_with_defaults(
    address: str, hidden: torch.Tensor, options: dict[str, Any]
) -> list[torch.Tensor]:
    """On this event loop also router and expert servers meet the device."""
    with torch.device("meta"):
        return await _ask(address, hidden, options)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("rows", [3, 5000], ids=["small", "in chunks"])
def test_answers_are_the_same_under_another_default_device_and_type(
    mesh: LocalMesh, options: dict[str, Any], rows: int
) -> None:
    hidden = torch.randn(rows, H, generator=torch.Generator().manual_seed(rows))
    expected = loop.run(_ask(mesh.address, hidden, options))

    torch.set_default_dtype(torch.float64)
    try:
        answers = loop.run(_ask_with_defaults(mesh.address, hidden, options))
    finally:
        torch.set_default_dtype(torch.float32)

    assert {str(answer.device) for answer in answers} == {"cpu"}
    for answer, other in zip(answers[:4], expected[:4], strict=True):
        assert answer.dtype == other.dtype == torch.float32
        # In which order servers add up is not fixed: on a narrow way that can tip a rounding.
        assert (answer - other).norm() <= _TIPPED[options.get("wire_dtype")] * other.norm()
