"""The gate of DeepSeek-V3, whose groups and bias the others lack."""

from __future__ import annotations

from expertmesh.model import GateSpec

V3 = GateSpec(
    score="sigmoid",
    top_k=8,
    n_group=8,
    topk_group=4,
    group_score="top2_sum",
    renormalize=True,
    renormalize_eps=1e-20,
    scale=2.5,
)
