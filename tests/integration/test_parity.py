"""The whole cluster against transformers' block in process, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import expertmesh
from tests.checkpoints import FAMILIES, make_checkpoint, make_fp8_checkpoint
from tests.mesh import local_mesh

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_equals_the_block_in_process(
    family: str, dtype: torch.dtype, shards: int, tmp_path: Path
) -> None:
    model = make_checkpoint(family, tmp_path, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    with (
        local_mesh(tmp_path, shards=shards) as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        layers = [layer.index for layer in mesh.describe().layers]
        hidden = torch.randn(2, 33, mesh.describe().hidden_size, generator=generator).to(dtype)
        outputs = [mesh.forward(hidden, layer) for layer in layers]

    assert layers == list(range(model.config.num_hidden_layers))
    for layer, output in zip(layers, outputs, strict=True):
        with torch.no_grad():
            expected = model.model.layers[layer].mlp(hidden)
        assert output.dtype == dtype
        assert relative_error(output, expected) <= TOLERANCE[dtype]


def test_every_router_gated_layer_equals_when_the_caller_gates(tmp_path: Path) -> None:
    model = make_checkpoint("deepseek_v3", tmp_path)
    hidden = torch.randn(21, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    block = model.model.layers[1].mlp
    with torch.no_grad():
        _, weights, ids = block.gate(hidden[None])
        routed = block.experts(hidden, ids, weights)
        whole = block(hidden[None])[0]

    with local_mesh(tmp_path) as cluster, expertmesh.connect(cluster.address) as mesh:
        alone = mesh.forward(hidden, 1, expert_ids=ids, expert_weights=weights)
        shared = mesh.forward(hidden, 1, expert_ids=ids, expert_weights=weights, shared=True)

    assert relative_error(alone, routed) <= TOLERANCE[torch.float32]
    assert relative_error(shared, whole) <= TOLERANCE[torch.float32]


def test_an_fp8_checkpoint_is_served_dequantised(tmp_path: Path) -> None:
    reference = make_fp8_checkpoint(tmp_path)
    prefix = "model.layers.0.mlp."

    with (
        local_mesh(tmp_path, dtype="float32") as cluster,
        expertmesh.connect(cluster.address) as mesh,
    ):
        hidden = torch.randn(5, mesh.describe().hidden_size)
        output = mesh.forward(hidden, 0)

    gate, up, down = (
        reference[f"{prefix}{name}_proj.weight"].float() for name in ("gate", "up", "down")
    )
    expected = (torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T
    assert relative_error(output, expected) <= TOLERANCE[torch.float32]
