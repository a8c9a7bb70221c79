"""SwiGLU experts on rows sorted by expert, with a backward written out: no padding, no dropping.

R = T * K rows, D hidden, F inner size of an expert, E experts. Autograd over a loop of experts
would copy every weight gradient into a zeroed stack once per expert; here each is written in place.
"""

from typing import Any

import torch


class SortedExperts(torch.autograd.Function):
    """y[r] = W2[e] (silu(a) * b), (a, b) = W13[e] x[r], for the rows of expert e in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        w13_EDG: torch.Tensor,
        w2_EFD: torch.Tensor,
        counts: list[int],
    ) -> torch.Tensor:
        """Return `[R, D]`; `counts` are the rows of each expert, in order; G = 2 F."""
        inner_RG = x_RD.new_empty(len(x_RD), w13_EDG.shape[2])
        for rows, out, w_DG in zip(
            x_RD.split(counts), inner_RG.split(counts), w13_EDG.unbind(), strict=True
        ):
            torch.mm(rows, w_DG, out=out)
        a_RF, b_RF = inner_RG.chunk(2, dim=1)
        gated_RF = torch.nn.functional.silu(a_RF).mul_(b_RF)
        y_RD = torch.empty_like(x_RD)
        for rows, out, w_FD in zip(
            gated_RF.split(counts), y_RD.split(counts), w2_EFD.unbind(), strict=True
        ):
            torch.mm(rows, w_FD, out=out)
        ctx.save_for_backward(x_RD, w13_EDG, w2_EFD, inner_RG, gated_RF)
        ctx.counts = counts
        return y_RD

    @staticmethod
    def backward(ctx: Any, dy_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, W13 and W2; an expert without rows gets zeros."""
        x_RD, w13_EDG, w2_EFD, inner_RG, gated_RF = ctx.saved_tensors
        counts = ctx.counts
        a_RF, b_RF = inner_RG.chunk(2, dim=1)
        dgated_RF, dw2_EFD = torch.empty_like(gated_RF), torch.empty_like(w2_EFD)
        pieces = zip(
            dy_RD.split(counts), gated_RF.split(counts), dgated_RF.split(counts), strict=True
        )
        for expert, (dy, gated, dgated) in enumerate(pieces):
            torch.mm(dy, w2_EFD[expert].T, out=dgated)
            torch.mm(gated.T, dy, out=dw2_EFD[expert])
        sigmoid_RF = torch.sigmoid(a_RF)
        dinner_RG = torch.empty_like(inner_RG)
        da_RF, db_RF = dinner_RG.chunk(2, dim=1)
        silu_RF = a_RF * sigmoid_RF
        torch.mul(dgated_RF, silu_RF, out=db_RF)
        # d silu(a) = sigmoid(a) + silu(a) (1 - sigmoid(a))
        slope_RF = silu_RF.sub_(silu_RF * sigmoid_RF).add_(sigmoid_RF)
        torch.mul(dgated_RF.mul_(b_RF), slope_RF, out=da_RF)
        dx_RD, dw13_EDG = torch.empty_like(x_RD), torch.empty_like(w13_EDG)
        pieces = zip(x_RD.split(counts), dinner_RG.split(counts), dx_RD.split(counts), strict=True)
        for expert, (x, dinner, dx) in enumerate(pieces):
            torch.mm(dinner, w13_EDG[expert].T, out=dx)
            torch.mm(x.T, dinner, out=dw13_EDG[expert])
        return dx_RD, dw13_EDG, dw2_EFD, None


class Permute(torch.autograd.Function):
    """Rows of tokens in the order of their experts; the backward gathers instead of scattering."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, order_R: torch.Tensor, back_R: torch.Tensor, k: int
    ) -> torch.Tensor:
        """Return x of the token of each sorted row; row r of the unsorted ones is token r // k."""
        ctx.save_for_backward(back_R)
        ctx.k = k
        return x_TD.index_select(0, order_R // k)

    @staticmethod
    def backward(ctx: Any, dx_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Sum what a token's K rows give back."""
        (back_R,) = ctx.saved_tensors
        dx_TKD = dx_RD.index_select(0, back_R).view(-1, ctx.k, dx_RD.shape[1])
        return dx_TKD.sum(1), None, None, None


class Unpermute(torch.autograd.Function):
    """Sorted rows `[R, D]` back to the order of tokens; its backward is a gather too."""

    @staticmethod
    def forward(
        ctx: Any, y_RD: torch.Tensor, order_R: torch.Tensor, back_R: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order_R)
        return y_RD.index_select(0, back_R)

    @staticmethod
    def backward(ctx: Any, dy_RD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order_R,) = ctx.saved_tensors
        return dy_RD.index_select(0, order_R), None, None


def sorted_experts(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    w13_EDG: torch.Tensor,
    w2_EFD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sum `[T, D]` of each token's experts, and the tokens `[E]` of each."""
    tokens, k = ids_TK.shape
    flat_R = ids_TK.flatten()
    counts_E = torch.bincount(flat_R, minlength=len(w2_EFD))
    order_R = flat_R.argsort(stable=True)
    back_R = torch.empty_like(order_R)
    back_R[order_R] = torch.arange(len(order_R))
    x_RD = Permute.apply(x_TD, order_R, back_R, k)
    y_RD = SortedExperts.apply(x_RD, w13_EDG, w2_EFD, counts_E.tolist())
    y_TKD = Unpermute.apply(y_RD, order_R, back_R).view(tokens, k, -1)
    return torch.bmm(weights_TK.unsqueeze(1), y_TKD).squeeze(1), counts_E
