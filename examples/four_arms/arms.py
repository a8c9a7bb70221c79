"""The four ways to balance, and nothing else: one arm is a gate, a loss weight and an update rate.

Weights are the papers' own, none was tuned here: alpha = 0.01 from Switch Transformers (arXiv
2101.03961; GShard states none), alpha = 0.001 and u = 0.001 from arXiv 2408.15664.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from expertmesh.gating import GateSpec
from expertmesh.training import expert_balance_loss, switch_loss

EXPERTS = 16
TOP_K = 2


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How one of the four models gates and balances."""

    label: str
    score: Literal["softmax", "sigmoid"]
    loss_weight: float = 0.0  # alpha
    update_rate: float = 0.0  # u of `load_controller.policy.sign`, per step

    @property
    def gate(self) -> GateSpec:
        """Both gates normalise the weights of the chosen two, as GShard and DeepSeek-V3 do."""
        return GateSpec(top_k=TOP_K, score=self.score, renormalize=True)

    def loss(self, scores_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """The auxiliary loss of one layer, without its weight."""
        if self.score == "softmax":
            return switch_loss(scores_TE, scores_TE.argmax(1))
        return expert_balance_loss(scores_TE, ids_TK)


ARMS = {
    "gshard": Arm(
        label="softmax, auxiliary loss (GShard manner)", score="softmax", loss_weight=0.01
    ),
    "sigmoid_aux": Arm(label="sigmoid, auxiliary loss", score="sigmoid", loss_weight=0.001),
    "loss_free": Arm(label="sigmoid, loss-free bias", score="sigmoid", update_rate=0.001),
    "none": Arm(label="sigmoid, no balancing", score="sigmoid"),
}
