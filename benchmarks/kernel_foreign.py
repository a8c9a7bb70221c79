"""Kernels of other engines, where they are installed: SGLang, vLLM, triton_kernels.

They follow the sources of SGLang 0.5.23, vLLM 0.33 and triton_kernels 3.5, and have never been run
by us: none was on a machine with a GPU. An adapter that fails is reported, and left out. `gate_up`
is [E, 2 I, H] with the gate's rows first, `down` [E, H, I].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from kernel_peers import Side

Adapter = Callable[[torch.Tensor, torch.Tensor], Side]


def sglang(gate_up: torch.Tensor, down: torch.Tensor) -> Side:
    """`fused_experts` of SGLang."""
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    config = MoeRunnerConfig(inplace=False)

    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        chosen = StandardTopKOutput(weights, ids, None)
        out: torch.Tensor = fused_experts(hidden, gate_up, down, chosen, config)
        return out

    return run


def vllm(gate_up: torch.Tensor, down: torch.Tensor) -> Side:
    """`fused_experts` of vLLM."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = fused_experts(hidden, gate_up, down, weights, ids)
        return out

    return run


def triton_kernels(gate_up: torch.Tensor, down: torch.Tensor) -> Side:
    """`matmul_ogs` of triton_kernels, which routes from logits: ours make it choose the same."""
    from triton_kernels.matmul_ogs import matmul_ogs
    from triton_kernels.routing import routing

    experts = len(gate_up)

    def run(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens, k = ids.shape
        logits = torch.full((tokens, experts), -1e9, device=hidden.device)
        # A softmax over the chosen gives weights that add up to 1 back.
        logits.scatter_(1, ids.long(), weights.log())
        routed, gather, scatter = routing(logits.to(hidden.dtype), k)
        h = matmul_ogs(hidden, gate_up.mT, None, routed, gather_indx=gather)
        gate_half, up_half = h.chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate_half) * up_half
        out: torch.Tensor = matmul_ogs(
            h, down.mT, None, routed, scatter_indx=scatter, gammas=routed.gate_scal
        )
        return out

    return run


ADAPTERS: dict[str, Adapter] = {"sglang": sglang, "vllm": vllm, "triton_kernels": triton_kernels}


def installed() -> dict[str, Adapter]:
    """The adapters whose package is here, by its name."""
    return {name: make for name, make in ADAPTERS.items() if importlib.util.find_spec(name)}
