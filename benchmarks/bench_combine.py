"""The sum of the servers' partial sums in a router, on a CPU.

python benchmarks/bench_combine.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from harness import Report, Spread, interleave, output_options, ratios, repeated
from machine import facts

from expertmesh import dispatch
from expertmesh.dispatch import Contribution, Holders
from router_service.kernels.avx512_sum import create_avx512_sum

_EXPERTS, _TOP_K, _HIDDEN = 64, 6, 2048
_TOKENS = (1, 64, 4096)
_SERVERS = (2, 4, 8, 16)
_ROWS = 1024  # in a round, or as many as one call has
_SAYS = f"""\
A layer of {_EXPERTS} experts, top-{_TOP_K} at random, hidden size {_HIDDEN}, bf16; experts are
spread over so many servers, and each answers with the rows that `dispatch.plan` sends there. `ours`
is the router's own code for AVX-512, one pass over every partial sum; `blocks` what stands in for
it elsewhere, torch in blocks of rows that stay in the cache; `torch` a float32 tensor of the whole
batch, to which each partial sum is added (`index_add_`) and which is rounded at last. Buffers are
warm, times are of one call, `ratio`s theirs over ours, round by round: median (least–largest). Two
servers that both have every row are added by torch on all sides but the last."""


def _contributions(tokens: int, servers: int) -> list[Contribution]:
    """What the servers of a planned batch answer."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, _EXPERTS, generator=generator).topk(_TOP_K).indices.int().numpy()
    holds = torch.arange(_EXPERTS) % servers == torch.arange(servers)[:, None]
    parts, _ = dispatch.plan(ids, Holders(holds.numpy(), torch.ones(servers).double().numpy()))
    return [
        (part.rows, torch.randn(len(part.expert_ids), _HIDDEN, generator=generator).bfloat16())
        for part in parts
    ]


def _whole(hidden: torch.Tensor, contributions: list[Contribution]) -> torch.Tensor:
    total = torch.zeros(hidden.shape)
    for rows, partial in contributions:
        if rows is None:
            total += partial
        else:
            total.index_add_(0, torch.from_numpy(rows), partial.float())
    return total.to(hidden.dtype)


def _measure(report: Report, tokens: int, servers: int, rounds: int) -> None:
    contributions = _contributions(tokens, servers)
    hidden = torch.empty(tokens, _HIDDEN, dtype=torch.bfloat16)
    room = torch.empty_like(hidden)
    kernel = create_avx512_sum()
    if kernel is None:
        raise SystemExit("this CPU has no AVX-512, or llvmlite is not installed")
    sides: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: dispatch.combine(hidden, contributions, room, kernel),
        "blocks": lambda: dispatch.combine(hidden, contributions, room),
        "torch": lambda: _whole(hidden, contributions),
    }
    share = sum(len(partial) for _, partial in contributions) / tokens / servers
    case = f"{servers} servers, T = {tokens}"
    expected = _whole(hidden, contributions)
    for name in ("ours", "blocks"):
        report.gate(case, sides[name](), expected, 0.0)
    calls = max(1, _ROWS // tokens)

    seconds = interleave({name: repeated(side, calls) for name, side in sides.items()}, rounds, 2)
    report.add(
        case,
        **{"rows a server": f"{share:.0%}"},
        **{
            f"{name} us": round(1e6 / calls * Spread.of(each).median, 1)
            for name, each in seconds.items()
        },
        **{f"{name} ratio": ratios(seconds[name], seconds["ours"]) for name in ("blocks", "torch")},
    )


@torch.no_grad()
def main() -> None:
    """Measures every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        theme="combine",
        title="The sum of partial sums in a router",
        command=f"python benchmarks/bench_combine.py --rounds {arguments.rounds}",
        says=_SAYS,
        facts=facts(),
    )
    for tokens in _TOKENS:
        for servers in _SERVERS:
            _measure(report, tokens, servers, arguments.rounds)
    report.publish(arguments)


if __name__ == "__main__":
    main()
