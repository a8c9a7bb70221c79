"""A Mixture-of-Experts decoder over bytes, small enough to train four ways on one core.

The family's shape (pre-norm attention, one shared expert and routed experts in every layer, gate in
fp32), without what a size like this does not need: learned positions instead of rotary ones, plain
multi-head attention instead of latent, no dense first layer.

B sequences of S bytes, T = B * S tokens, D hidden, E experts, K chosen, F inner size, L layers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from examples.four_arms.arms import EXPERTS, Arm
from examples.four_arms.experts import sorted_experts
from expertmesh import gating

VOCABULARY = 256
CONTEXT = 128
HIDDEN = 64
HEADS = 4
LAYERS = 2
INNER = 64
DEVIATION = 0.5 * HIDDEN**-0.5  # of fresh weights: a fresh layer says little beside the residual


@dataclass
class Pass:
    """What one forward pass gave."""

    logits_BSV: torch.Tensor
    counts_LE: torch.Tensor  # int64, tokens given to each expert
    loss: torch.Tensor  # auxiliary loss, mean over the layers, not weighted


class Layer(nn.Module):
    """Attention and experts, each added to the residual stream."""

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.arm = arm
        self.qkv = _matrix(3 * HIDDEN, HIDDEN)
        self.out = _matrix(HIDDEN, HIDDEN)
        self.gate = _matrix(EXPERTS, HIDDEN)
        self.shared_w13 = _matrix(2 * INNER, HIDDEN)
        self.shared_w2 = _matrix(HIDDEN, INNER)
        self.w13 = _matrix(EXPERTS, HIDDEN, 2 * INNER)
        self.w2 = _matrix(EXPERTS, INNER, HIDDEN)
        self.attention_norm = nn.Parameter(torch.ones(HIDDEN))
        self.experts_norm = nn.Parameter(torch.ones(HIDDEN))
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the stream after this layer, the counts `[E]`, and the auxiliary loss."""
        x_BSD = x_BSD + self._attend(rms_norm(x_BSD, (HIDDEN,), self.attention_norm))
        x_TD = rms_norm(x_BSD, (HIDDEN,), self.experts_norm).view(-1, HIDDEN)
        scores_TE = gating.scores(linear(x_TD, self.gate), self.arm.gate)
        with torch.no_grad():
            ids_TK = gating.choose(scores_TE, self.arm.gate, self.bias)
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        y_TD, counts_E = sorted_experts(x_TD, ids_TK, weights_TK, self.w13, self.w2)
        a_TF, b_TF = linear(x_TD, self.shared_w13).chunk(2, dim=1)
        y_TD = y_TD + linear(silu(a_TF) * b_TF, self.shared_w2)
        loss = self.arm.loss(scores_TE, ids_TK) if self.arm.loss_weight else scores_TE.new_zeros(())
        return x_BSD + y_TD.view_as(x_BSD), counts_E, loss

    def _attend(self, x_BSD: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x_BSD.shape
        qkv = linear(x_BSD, self.qkv).view(batch, length, 3, HEADS, HIDDEN // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(mixed.transpose(1, 2).reshape(batch, length, HIDDEN), self.out)


class Decoder(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, arm: Arm, seed: int) -> None:
        """The weights depend on the seed alone, so all arms start from the same ones."""
        super().__init__()
        self.arm = arm
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.bytes = _matrix(VOCABULARY, HIDDEN)
            self.positions = _matrix(CONTEXT, HIDDEN)
            self.layers = nn.ModuleList(Layer(arm) for _ in range(LAYERS))
            self.head = _matrix(VOCABULARY, HIDDEN)
        self.norm = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, ids_BS: torch.Tensor) -> Pass:
        """Return logits, counts and the auxiliary loss for int64 ids of at most CONTEXT bytes."""
        x_BSD = embedding(ids_BS, self.bytes) + self.positions[: ids_BS.shape[1]]
        counts, losses = [], []
        for layer in self.layers:
            x_BSD, counts_E, loss = layer(x_BSD)
            counts.append(counts_E)
            losses.append(loss)
        logits_BSV = linear(rms_norm(x_BSD, (HIDDEN,), self.norm), self.head)
        return Pass(logits_BSV, torch.stack(counts), torch.stack(losses).mean())


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * DEVIATION)
