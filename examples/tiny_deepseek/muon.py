"""Muon: momentum whose every matrix is made orthogonal before it is applied.

Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Unlike `torch.optim.Muon` this
one takes stacks of matrices, as the experts of a layer are.
"""

from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """For weights `[..., out, in]`; leading dimensions (experts) are matrices of their own."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nobody here re-evaluates a loss
        """Apply one Nesterov step with the orthogonalised momentum."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum"], group["momentum"])
                rows, columns = weight.shape[-2:]
                scale = max(1.0, rows / columns) ** 0.5
                weight.add_(orthogonalise(update), alpha=-group["lr"] * scale)


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push every singular value of `[..., M, N]` towards 1 by a quintic Newton-Schulz iteration."""
    a, b, c = (
        3.4445,
        -4.7750,
        2.0315,
    )  # steepest at zero; ends within about [0.7, 1.2], which is enough
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
