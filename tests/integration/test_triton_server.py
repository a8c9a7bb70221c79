"""Whole expert servers with the Triton backend behind gRPC; without a GPU under the interpreter.

One shard at a time: Triton's interpreter is not made for two threads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import expertmesh
from expert_service.server import ExpertServer
from expertmesh.errors import ConfigError
from expertmesh.v1 import router_pb2
from tests.checkpoints import make_checkpoint, make_fp8_checkpoint
from tests.kernels.tolerances import RELATIVE, W8A8_ERROR
from tests.mesh import local_mesh, wait_until


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows", [1, 33])
def test_every_layer_equals_the_block_in_process(rows: int, tmp_path: Path) -> None:
    model = make_checkpoint("qwen2_moe", tmp_path)
    hidden = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))

    with (
        local_mesh(tmp_path, shards=1, backend="triton") as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        outputs = [mesh.forward(hidden, layer) for layer in range(3)]
        backends = {server.backend for server in mesh.status().servers}

    assert backends == {"triton/cuda" if torch.cuda.is_available() else "triton/cpu"}
    for layer, output in enumerate(outputs):
        with torch.no_grad():
            expected = model.model.layers[layer].mlp(hidden[None])[0]
        assert _relative_error(output, expected) <= RELATIVE[torch.float32]


@pytest.mark.parametrize(
    ("weights", "tolerance"),
    [
        ("auto", RELATIVE[torch.float32]),
        ("fp8-w8a16", RELATIVE[torch.float32]),
        ("fp8-w8a8", W8A8_ERROR),
        ("dequantised", RELATIVE[torch.float32]),
    ],
)
def test_an_fp8_checkpoint_is_served_from_fp8_weights(
    weights: str, tolerance: float, tmp_path: Path
) -> None:
    reference = make_fp8_checkpoint(tmp_path, num_hidden_layers=2)
    hidden = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    with (
        local_mesh(tmp_path, shards=1, backend="onednn", dtype="float32") as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        expected = mesh.forward(hidden, 1)

    with (
        local_mesh(
            tmp_path, shards=1, backend="triton", dtype="float32", weights=weights
        ) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        outputs = [mesh.forward(hidden, layer) for layer in (0, 1)]
        held = _weight_dtypes(cluster.servers[0])

    assert held == {torch.float32 if weights == "dequantised" else torch.float8_e4m3fn}
    assert _relative_error(outputs[0], _dense(reference, hidden)) <= tolerance
    assert _relative_error(outputs[1], expected) <= tolerance


def _weight_dtypes(server: ExpertServer) -> set[torch.dtype]:
    layers = server._backend._layers.values()  # type: ignore[attr-defined]
    return {s.matrices.gate_LIH.dtype for layer in layers for s in layer.stacks.values()}


def _dense(reference: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Layer 0, which is dense."""
    names = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    gate, up, down = (reference[name].float() for name in names)
    return (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T


def test_a_server_whose_shard_does_not_fit_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("mixtral", tmp_path)
    device = "expert_service.kernels.triton.backend.device.InterpreterDevice.free_bytes"
    monkeypatch.setattr(device, lambda self: 1 << 20)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)

    with (
        local_mesh(tmp_path, shards=1) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        server = cluster.start_server("small", 0, 1, backend="triton", device="cpu")
        wait_until(server.failed.done, 20.0, "failed")

        def told() -> router_pb2.ServerStatus | None:
            return next((s for s in mesh.status().servers if s.error), None)

        wait_until(told, 20.0, "told")
        said = told()

    assert isinstance(server.failed.result(), ConfigError)
    assert said is not None
    assert "24 experts x 72.00 KiB of float32" in said.error
    assert "1.00 MiB free: use more shards" in said.error
