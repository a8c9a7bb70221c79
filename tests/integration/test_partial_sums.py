"""The same rows on one, two and three servers, and before and after a move: how far answers differ.

The bound is the one of docs/protocol.md, "Partial sums"; what is summed here cancels nearly whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

import expertmesh
from fleet.control import migrate
from load_controller.planner import Move
from tests.checkpoints import edit_tensors, make_checkpoint
from tests.mesh import LocalMesh, local_mesh

E, LAYER, ROWS = 6, 1, 200
#: Two experts that are alike, on different servers where there are several; and another one.
TWINS, OTHER = (0, E - 1), 3
GATE_WEIGHTS = (1.28e6, -1.27e6, 1.0)
LARGEST_FLOAT16 = 65504.0
#: Unit roundoff of an answer, and of a partial sum, by the caller's dtype.
ROUNDOFF = {torch.float16: (2**-11, 0.0), torch.bfloat16: (2**-8, 2**-8), torch.float32: (0.0, 0.0)}
FLOAT32 = 1e-5  # what computing in float32 is off by, relative to the parts of a sum


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LocalMesh]]:
    """One on one server, one on two, one on three, of one checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("olmoe", path, num_experts=E, num_experts_per_tok=len(GATE_WEIGHTS))
    tensors = model.state_dict()
    prefix = f"model.layers.{LAYER}.mlp.experts"
    gate_up, down = (tensors[f"{prefix}.{name}"] for name in ("gate_up_proj", "down_proj"))
    gate_up[TWINS[1]], down[TWINS[1]] = gate_up[TWINS[0]], down[TWINS[0]]
    width = down.shape[2]
    edit_tensors(
        path,
        **{
            f"{prefix}.{TWINS[1]}.gate_proj.weight": gate_up[TWINS[1], :width].clone(),
            f"{prefix}.{TWINS[1]}.up_proj.weight": gate_up[TWINS[1], width:].clone(),
            f"{prefix}.{TWINS[1]}.down_proj.weight": down[TWINS[1]].clone(),
        },
    )
    with ExitStack() as stack:
        meshes = [stack.enter_context(local_mesh(path, shards=count)) for count in (1, 2, 3)]
        for mesh in meshes:
            mesh.model = model
        yield meshes


def _parts(mesh: LocalMesh, hidden: torch.Tensor) -> torch.Tensor:
    """Every weighted expert output, [K, T, H] float32."""
    assert mesh.model is not None
    experts = mesh.model.model.layers[LAYER].mlp.experts  # type: ignore[union-attr, index]
    ids = torch.tensor([*TWINS, OTHER])
    with torch.no_grad():
        return torch.stack(
            [
                experts(hidden.float(), torch.full((ROWS, 1), int(e)), torch.full((ROWS, 1), w))
                for e, w in zip(ids, GATE_WEIGHTS, strict=True)
            ]
        )


def _ask(mesh: LocalMesh, hidden: torch.Tensor) -> torch.Tensor:
    gates = {
        "expert_ids": torch.tensor([*TWINS, OTHER]).repeat(len(hidden), 1),
        "expert_weights": torch.tensor(GATE_WEIGHTS).repeat(len(hidden), 1),
    }
    with expertmesh.connect(mesh.address) as client:
        return client.forward(hidden, LAYER, **gates)


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=["fp16", "bf16", "fp32"])
def test_parts_that_cancel_are_right_on_any_number_of_servers_and_after_a_move(
    clusters: list[LocalMesh], dtype: torch.dtype
) -> None:
    steps = torch.randint(-8, 9, (ROWS, 64), generator=torch.Generator().manual_seed(0))
    hidden = (steps / 4).to(dtype)  # exact in each
    parts = _parts(clusters[0], hidden)
    expected, magnitude = parts.double().sum(0), parts.double().abs().sum(0)
    assert (parts.abs() > LARGEST_FLOAT16).any()
    assert (expected.abs() < LARGEST_FLOAT16).all()

    outputs = [_ask(mesh, hidden) for mesh in clusters]
    three = clusters[-1]
    with expertmesh.connect(three.address) as client:
        epoch = client.load().epoch
    homes = {
        expert: server._placing.server_id
        for server in three.servers
        for slot in server.shard.slots
        for layer, expert in [slot]
        if layer == LAYER
    }
    twin, to = TWINS[1], homes[TWINS[0]]  # now both twins are on one server
    migrate(
        three.controller.address,
        [Move("load", LAYER, twin, to), Move("drop", LAYER, twin, homes[twin])],
    )
    outputs.append(_ask(three, hidden))
    with expertmesh.connect(three.address) as client:
        assert client.load().epoch > epoch
    migrate(
        three.controller.address,
        [Move("load", LAYER, twin, homes[twin]), Move("drop", LAYER, twin, to)],
    )

    answer, partial = ROUNDOFF[dtype]
    bound = answer * expected.abs() + (partial + FLOAT32) * magnitude
    for output in outputs:
        assert output.dtype == dtype
        assert ((output.double() - expected).abs() <= bound).all()
