"""A skewed load on a running cluster of four servers, before and after its experts are placed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import expertmesh
from fleet.control import migrate
from fleet.proposal import Proposal, propose
from fleet.survey import survey
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh

LAYER, EXPERTS, TOP_K, SERVERS, REDUNDANT = 1, 256, 8, 4, 32
ROWS = 4096
ZIPF = 1.0
BEFORE, AFTER = 1.5, 0.15  # MaxVio of servers, in served rows


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(
        "deepseek_v3", path, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K,
        n_group=1, topk_group=1, moe_intermediate_size=8, n_shared_experts=1, num_hidden_layers=2,
    )  # fmt: skip
    with local_mesh(path, shards=SERVERS) as mesh:
        yield mesh


def _zipf_ids(generator: np.random.Generator) -> torch.Tensor:
    """[ROWS, TOP_K] distinct experts a row, the first ones by far the most often."""
    weight = np.arange(1, EXPERTS + 1) ** -ZIPF
    # The largest of weight-scaled exponential draws: a sample without replacement.
    keys = np.log(generator.random((ROWS, EXPERTS))) / weight
    return torch.from_numpy(np.argsort(-keys, axis=1)[:, :TOP_K].astype(np.int32))


def _executed(cluster: LocalMesh) -> np.ndarray:
    """Routed pairs that each server has computed so far."""
    return np.array(
        [int(server.shard._layers[LAYER].counts_E[:EXPERTS].sum()) for server in cluster.servers]
    )


def _serve(cluster: LocalMesh, client: expertmesh.Mesh, ids: torch.Tensor) -> float:
    """Sends rows of those experts; MaxVio of what the servers computed."""
    before = _executed(cluster)
    hidden = torch.randn(ROWS, client.describe().hidden_size)
    weights = torch.full(ids.shape, 1.0 / TOP_K)
    client.forward(hidden, LAYER, expert_ids=ids, expert_weights=weights, timeout=60.0)
    served = _executed(cluster) - before
    assert served.sum() == ids.numel()
    return float(served.max() / served.mean() - 1)


def _place(cluster: LocalMesh) -> Proposal:
    proposal = propose(survey(cluster.routers[0].address), REDUNDANT)
    migrate(cluster.controller.address, [m for each in proposal.layers for m in each.moves])
    return proposal


def test_a_zipf_load_is_even_after_placement_and_answers_are_the_same(cluster: LocalMesh) -> None:
    generator = np.random.default_rng(0)
    with expertmesh.connect(cluster.address) as client:
        probe = torch.randn(64, client.describe().hidden_size)
        output = client.forward(probe, LAYER)
        counts = client.load().router_gated[LAYER]
        before = _serve(cluster, client, _zipf_ids(generator))

        proposal = _place(cluster)
        after = _serve(cluster, client, _zipf_ids(generator))
        counted = client.load().router_gated[LAYER]
        again = client.forward(probe, LAYER)
        counts_again = client.load().router_gated[LAYER] - counted

    assert before >= BEFORE
    assert after <= AFTER
    moved = proposal.layers[0]
    assert moved.loads > 0
    held = sum(
        len([s for s in x.shard.slots if s.layer == LAYER and s.expert < EXPERTS])
        for x in cluster.servers
    )
    assert held <= EXPERTS + REDUNDANT
    assert torch.equal(counts, counts_again), "the same experts were chosen"
    assert (again - output).norm() <= 1e-6 * output.norm()
