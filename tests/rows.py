"""Hidden states of a tiny model, and what the model makes of them."""

from __future__ import annotations

import numpy as np
import torch

from expertmesh.codec.messages import ExecuteRequest
from tests.mesh import LocalMesh

H = 64  # the hidden size
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Drawn hidden states."""
    return torch.randn(count, H, generator=torch.Generator().manual_seed(seed))


def truth(mesh: LocalMesh, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """What the served model's layer makes of them in process."""
    assert mesh.model is not None
    with torch.no_grad():
        output: torch.Tensor = mesh.model.model.layers[layer].mlp(hidden[None])[0]
    return output


def execute_request(hidden: torch.Tensor) -> ExecuteRequest:
    """All of them for one expert."""
    return ExecuteRequest(
        layer=1,
        hidden_states=hidden,
        expert_ids=np.zeros((len(hidden), 1), np.int32),
        expert_weights=np.ones((len(hidden), 1), np.float32),
    )
