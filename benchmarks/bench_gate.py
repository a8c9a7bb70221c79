"""The gate alone on a CPU: from rows to chosen experts and weights, beside transformers' routers.

python benchmarks/bench_gate.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Report, Spread, interleave, output_options, ratios, repeated
from machine import facts
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from expertmesh import gating
from expertmesh.model import GateSpec, GateWeights
from router_service.kernels.avx512_gate import create_avx512_gate

_TOKENS = (1, 8, 64, 512, 4096)
_TOLERANCE = 1e-2  # Qwen3's weights are bfloat16
_ROWS = 2048  # in a round, or as many as one call has
_SAYS = """\
Hidden states and weights in bfloat16, random; the same rows again and again, so caches are warm.
`ours` is the router's own code for AVX-512, logits, choice and weights; `gating` the same in torch
and numpy, which stands in for it elsewhere and is its reference; `transformers` the family's router
module. Times are of one call, `ratio`s theirs over ours, round by round: median (least–largest).
What is missing is left to torch. `error` is the largest relative error of the weights as a table
[T, E]; for Qwen3, whose logits are bfloat16 and often equal, of each row's weights in order."""


@dataclass(frozen=True, slots=True)
class Model:
    """A family's gate, and the module that transformers has for it."""

    name: str
    hidden: int
    experts: int
    spec: GateSpec
    peer: Callable[[], nn.Module]


_V3 = GateSpec(
    score="sigmoid", top_k=8, n_group=8, topk_group=4, group_score="top2_sum", renormalize=True,
    renormalize_eps=1e-20, scale=2.5, logits_float32=True,
)  # fmt: skip
_QWEN3 = GateSpec(score="softmax", top_k=8, renormalize=True, round_weights=True)
MODELS = (
    Model(
        "DeepSeek-V2-Lite",
        2048,
        64,
        GateSpec(score="softmax", top_k=6, logits_float32=True),
        lambda: DeepseekV2TopkRouter(
            DeepseekV2Config(
                hidden_size=2048, n_routed_experts=64, num_experts_per_tok=6, n_group=1,
                topk_group=1, topk_method="greedy", routed_scaling_factor=1.0,
            )
        ),
    ),
    Model("DeepSeek-V3", 7168, 256, _V3, lambda: DeepseekV3TopkRouter(DeepseekV3Config())),
    Model(
        "Qwen3-30B-A3B",
        2048,
        128,
        _QWEN3,
        lambda: Qwen3MoeTopKRouter(
            Qwen3MoeConfig(
                hidden_size=2048, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True
            )
        ),
    ),
)  # fmt: skip


def _comparable(model: Model, routing: gating.Routing) -> torch.Tensor:
    """What all sides must agree in: weights as a table [T, E]; in order [T, K] for logits in
    bfloat16, many of which are equal, so that who is chosen is open."""
    weights = routing.weights.float()
    if not model.spec.logits_float32:
        return weights.sort(1, descending=True).values
    table = torch.zeros(len(weights), model.experts)
    return table.scatter_(1, routing.expert_ids.long(), weights)


def _measure(report: Report, model: Model, tokens: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(model.experts, model.hidden, generator=generator) / model.hidden**0.5
    rows = torch.randn(tokens, model.hidden, generator=generator).bfloat16()
    peer = model.peer()
    peer.weight.data = weight.bfloat16()
    held = weight.bfloat16().float() if model.spec.logits_float32 else weight.bfloat16()
    gate = GateWeights(held, torch.zeros(model.experts), None)
    kernel = create_avx512_gate(gate, model.spec)
    if kernel is None:
        raise SystemExit("this CPU has no AVX-512 BF16, or llvmlite is not installed")
    if not kernel.takes(rows):
        return

    def ours() -> gating.Routing:
        return kernel.route(rows, gate.bias)[1]

    def reference() -> gating.Routing:
        return gating.route(rows, gate, model.spec, gate.bias)

    def theirs() -> gating.Routing:
        _, weights, ids = peer(rows)
        return gating.Routing(ids, weights)

    case = f"{model.name}, T = {tokens}"
    sides = {"ours": ours, "gating": reference, "transformers": theirs}
    expected = _comparable(model, theirs())
    for side in (ours, reference):
        report.gate(case, _comparable(model, side()), expected, _TOLERANCE)
    calls = max(1, _ROWS // tokens)

    seconds = interleave({name: repeated(side, calls) for name, side in sides.items()}, rounds, 2)
    report.add(
        case,
        **{
            f"{name} us": round(1e6 / calls * Spread.of(each).median, 1)
            for name, each in seconds.items()
        },
        **{
            f"{name} ratio": ratios(seconds[name], seconds["ours"])
            for name in sides
            if name != "ours"
        },
    )


@torch.no_grad()
def main() -> None:
    """Measures every model and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report(
        theme="gate",
        title="The gate on a CPU",
        command="python benchmarks/bench_gate.py "
        f"--rounds {arguments.rounds} --threads {arguments.threads}",
        says=_SAYS,
        facts=facts(),
    )
    for model in MODELS:
        for tokens in _TOKENS:
            _measure(report, model, tokens, arguments.rounds)
    report.publish(arguments)


if __name__ == "__main__":
    main()
