"""From router logits to chosen experts and weights in one launch.

    s = sigmoid(logits) or softmax(logits)                       scores, float32
    c = s + b, and -inf outside the best `topk_group` groups     b decides who is chosen, no more
    chosen = TopK(c)                                             a tie goes to the lower index
    g = s[chosen], divided by its sum where the family does so, times `scale`

The device's form of `expertmesh.gating.select`, which is its reference. T tokens, E experts in G
groups of S, K chosen. A program takes BLOCK_T tokens whole, [BLOCK_T, G, S]. Choices are compared
as integers that hold the value above and the index below, so none is equal to another: ties need
no care, and a row of NaN still gets distinct ids.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Arguments of a kernel have no type that mypy knows.

import torch
import triton
import triton.language as tl

from expertmesh.gating import Routing
from expertmesh.model import GateSpec

#: Scores that one program holds, at four warps.
_BLOCK_SCORES = 1024
#: A key below all others: never chosen, or not again.
_LOWEST = tl.constexpr(-0x8000000000000000)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _ordered(value, index, valid):
    """int64 keys that order as `value`, NaN on top, and then the lower `index` first."""
    bits = value.to(tl.int32, bitcast=True)
    # Two's complement orders negative floats backwards.
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value == value, order, 0x7FFFFFFF)
    return tl.where(valid, (order.to(tl.int64) << 32) - index, _LOWEST)


@triton.jit
def _row_max(values_TGS):
    return tl.max(tl.max(values_TGS, axis=2), axis=1)[:, None, None]


@triton.jit
def _row_sum(values_TGS):
    return tl.sum(tl.sum(values_TGS, axis=2), axis=1)[:, None, None]


@triton.jit
def _kept_groups(
    choice,
    index,
    valid,
    group,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP2_SUM: tl.constexpr,
):
    """Which of the groups [T, G, 1] are among the best."""
    best = tl.max(choice, axis=2)
    if TOP2_SUM:
        key = _ordered(choice, index, valid)
        is_first = key == tl.max(key, axis=2)[:, :, None]
        first = tl.sum(tl.where(is_first, choice, 0.0), axis=2)
        best = first + tl.max(tl.where(is_first, float("-inf"), choice), axis=2)
    key = _ordered(best[:, :, None], group, group < GROUPS)  # [T, G, 1]
    kept = key != key
    for _ in tl.static_range(TOPK_GROUP):
        is_best = key == tl.max(key, axis=1)[:, None, :]
        kept = kept | is_best
        key = tl.where(is_best, _LOWEST, key)
    return kept


# The number of tokens varies: no batch waits for a compilation.
@triton.jit(do_not_specialize=["T"])
def _gate_topk_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    T,
    stride_lt,
    scale,
    eps,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    S: tl.constexpr = E // GROUPS
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, BLOCK_G)[None, :, None]
    member = tl.arange(0, BLOCK_S)[None, None, :]
    index = group * S + member  # [1, BLOCK_G, BLOCK_S]
    valid = (group < GROUPS) & (member < S)
    row = token.to(tl.int64)[:, None, None]
    mask = valid & (row < T)
    logits = tl.load(logits_ptr + row * stride_lt + index, mask=mask, other=0.0).to(tl.float32)

    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        logits = tl.where(valid, logits, float("-inf"))
        powers = tl.exp(logits - _row_max(logits))
        scores = powers / _row_sum(powers)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + index, mask=valid, other=0.0)
    choice = tl.where(valid, choice, float("-inf"))
    if TOPK_GROUP < GROUPS:
        kept = _kept_groups(choice, index, valid, group, GROUPS, TOPK_GROUP, TOP2_SUM)
        choice = tl.where(kept, choice, float("-inf"))

    slot = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    key = _ordered(choice, index, valid)
    for k in tl.static_range(K):
        is_best = key == _row_max(key)
        best_id = tl.sum(tl.sum(tl.where(is_best, index, 0), axis=2), axis=1)
        best_score = tl.sum(tl.sum(tl.where(is_best, scores, 0.0), axis=2), axis=1)
        ids = tl.where(slot == k, best_id[:, None], ids)
        weights = tl.where(slot == k, best_score[:, None], weights)
        key = tl.where(is_best, _LOWEST, key)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + eps)
    weights = weights * scale
    if ROUND:
        weights = weights.to(logits_ptr.dtype.element_ty).to(tl.float32)

    offs = token.to(tl.int64)[:, None] * K + slot
    mask = (token < T)[:, None] & (slot < K)
    tl.store(ids_ptr + offs, ids, mask=mask)
    tl.store(weights_ptr + offs, weights, mask=mask)


def gate_topk(
    logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None = None
) -> Routing:
    """Chooses `spec.top_k` experts for each row of logits, and weighs them.

    See `expertmesh.gating.select`: the same sets of ids, and weights but for the last bits of the
    exponential. `bias_E` is float32. The spec must have passed `check_gate`.
    """
    _check(logits_TE, spec, bias_E)
    T, E = logits_TE.shape
    ids_TK = torch.empty(T, spec.top_k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(T, spec.top_k, dtype=torch.float32, device=logits_TE.device)
    if not T:
        return Routing(ids_TK, weights_TK)
    groups = spec.n_group if spec.topk_group < spec.n_group else 1  # nothing to mask: one group
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(E // groups)
    block_t = max(1, _BLOCK_SCORES // (block_g * block_s))
    _gate_topk_kernel[(triton.cdiv(T, block_t),)](
        logits_TE,
        logits_TE if bias_E is None else bias_E,
        ids_TK,
        weights_TK,
        T,
        logits_TE.stride(0),
        float(spec.scale),
        float(spec.renormalize_eps),
        E=E,
        K=spec.top_k,
        GROUPS=groups,
        TOPK_GROUP=min(spec.topk_group, groups),
        SIGMOID=spec.score == "sigmoid",
        HAS_BIAS=bias_E is not None,
        TOP2_SUM=spec.group_score == "top2_sum",
        RENORMALIZE=spec.renormalize,
        ROUND=spec.round_weights and logits_TE.dtype != torch.float32,
        BLOCK_T=block_t,
        BLOCK_G=block_g,
        BLOCK_S=block_s,
        BLOCK_K=triton.next_power_of_2(spec.top_k),
    )
    return Routing(ids_TK, weights_TK)


def _check(logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None) -> None:
    shape = tuple(logits_TE.shape)
    if logits_TE.dim() != 2 or logits_TE.dtype not in _DTYPES:
        raise ValueError(f"logits are {logits_TE.dtype} {shape}; expected floating point [T, E]")
    if logits_TE.numel() and logits_TE.stride(1) != 1:
        raise ValueError(f"logits {shape} have strides {logits_TE.stride()}; expected rows dense")
    if shape[1] < spec.top_k or shape[1] % spec.n_group:
        raise ValueError(
            f"logits {shape} with top_k {spec.top_k} and n_group {spec.n_group}; expected at least "
            "top_k experts, in equal groups"
        )
    if bias_E is not None and (
        bias_E.dtype != torch.float32 or bias_E.shape != shape[1:] or not bias_E.is_contiguous()
    ):
        raise ValueError(
            f"bias is {bias_E.dtype} {tuple(bias_E.shape)}; expected contiguous float32 "
            f"({shape[1]},)"
        )
