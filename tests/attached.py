"""A cluster with the model that it serves, and what the model computes in process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.checkpoints import build_model, make_checkpoint
from tests.mesh import local_mesh

NEW_TOKENS = 12
# Two texts, the first of them shorter: padded at its left.
TOKENS = torch.randint(2, 128, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])

both_gates = pytest.mark.parametrize("gate", ["cluster", "model"])


@dataclass(frozen=True)
class Served:
    """A cluster, and the model that it serves as it is in process."""

    family: str
    path: Path
    address: str
    reference: PreTrainedModel
    logits: torch.Tensor
    text: torch.Tensor

    def model(self) -> PreTrainedModel:
        """The same model once more, to attach."""
        return build_model(self.family)


@contextmanager
def serve(family: str, path: Path) -> Iterator[Served]:
    """Serves a tiny model of `family`, saved in the folder `path`."""
    reference = make_checkpoint(family, path)
    threads = torch.get_num_threads()
    # Matrices this small gain nothing from a second one, and wait for it on a busy machine.
    torch.set_num_threads(1)
    try:
        with local_mesh(path) as mesh:
            expected, text = logits(reference), generate(reference)
            yield Served(family, path, mesh.address, reference, expected, text)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of both texts."""
    output: torch.Tensor = model(TOKENS, attention_mask=MASK).logits
    return output


def generate(model: Any) -> torch.Tensor:
    """Both texts, continued greedily."""
    output: torch.Tensor = model.generate(
        TOKENS, attention_mask=MASK, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return output


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of whole tensors, by norm."""
    return ((actual - expected).norm() / expected.norm()).item()
