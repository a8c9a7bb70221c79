"""What moving the bias while serving costs the text and gains the balance: a trained model, skewed.

python benchmarks/bench_serving_bias.py [--mix code-pages] [--plot docs/images/serving_bias.png]
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch: threads that wait take no core
sys.path.insert(0, str(Path(__file__).parents[1]))  # the cluster in one process is the tests' own

import torch
from harness import Report, Spread, WrongOutputError, output_options
from machine import facts
from mixes import MIXES, draw
from serving_bias_plot import draw_trade_off
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3ForCausalLM

import expertmesh
from examples.tiny_deepseek import corpus
from expertmesh import BalanceConfig
from expertmesh.huggingface import attach
from load_controller.policy import max_violation
from tests.mesh import local_mesh

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny_deepseek"
TOLERANCE = 1e-4  # fp32
BATCH = 16  # windows of 256 bytes: 4096 rows of a layer, which is one window of the controller
_TIP = 1e-6  # relative noise, a few times float32's rounding
_TIPS = 8
_TIMEOUT_S = 600.0  # of a layer: a machine that does something else first changes no figure
_NATS = 1 / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()  # bits in one
_ADAPTIVE = BalanceConfig(
    mode="adaptive",
    update_rate=0.02,
    schedule="cosine",
    update_rate_floor=1e-3,
    window_tokens=BATCH * corpus.CONTEXT,
    window_s=3600.0,  # windows close by rows alone: the machine's speed decides nothing
)
SETTINGS = {
    "frozen": replace(_ADAPTIVE, mode="frozen"),
    **{f"max_delta {bound}": replace(_ADAPTIVE, max_delta=bound) for bound in (0.02, 0.05, 0.1)},
    **{
        f"ceiling {ceiling}": replace(_ADAPTIVE, divergence_ceiling=ceiling)
        for ceiling in (0.05, 0.1, 0.2)
    },
    "adaptive": _ADAPTIVE,
}
_SAYS = """\
The example model (2.7 million weights, 16 experts, 4 chosen within 2 of 4 groups, bias trained
without a loss) is served by a cluster of one router, one controller and two expert servers, all in
one process over gRPC on loopback; a client computes embedding, attention and head, and the routers
gate. Every answer before the first push is compared with the model in process: `error` is of the
logits of the first batch, without windows in which two experts score so nearly the same that noise
of 1e-6 on the embeddings chooses the other.

* Mix `{mix}`: windows of 256 bytes, drawn without repetition. {warm_up} batches of 16 windows adapt
  the bias, the next {measured} are measured; the bias goes on adapting through them. A repetition
  draws other windows, and all settings of one repetition see the same ones.
* `max_delta`: no bias further than this from the trained one. `ceiling`: a delta that changes a
  larger share of the sampled picks is halved before it is published, or taken back. `adaptive`:
  neither.
* `bits per byte` of the measured windows, and `more` than frozen on the same windows: what the text
  pays. Perplexity per byte is 2 to that power.
* `MaxVio` over all measured rows, mean over the three layers, and of the worst layer; `batch
  MaxVio` is the mean over batches of 4096 bytes. `divergence`: share of picks that the trained bias
  would not have made, as the controller measures it on samples, mean over layers and batches.
  `largest delta`: of any expert of any layer at the end.
* Cells are median (least–largest); repetitions: {repetitions}.

u = 0.02 at first and 0.001 after the warm-up, by half a cosine. One small model on one mix: the
signs carry over to others, the sizes do not."""


class Fine(Spread):
    """Three digits: a few thousandths of a bit are a difference here."""

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.min:.3f}–{self.max:.3f})"


@dataclass(frozen=True)
class Served:
    """What one repetition of one setting gave."""

    bits_per_byte: float
    maxvio: list[float]  # by layer, over all measured rows
    batch_maxvio: float
    divergence: float
    max_abs_delta: float


def serve(
    config: BalanceConfig, windows: torch.Tensor, warm_up: int, report: Report, case: str
) -> Served:
    """Sends the windows through a cluster of its own; the first `warm_up` batches only adapt it."""
    model = DeepseekV3ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    batches = windows.split(BATCH)
    expected = model(input_ids=batches[0][:, :-1], use_cache=False).logits
    firm = _firm(model, batches[0][:, :-1], expected)
    nats, divergences, violations = 0.0, [], []
    with (
        local_mesh(CHECKPOINT, balance=config) as cluster,
        attach(model, cluster.address, gate="cluster", timeout=_TIMEOUT_S),
        expertmesh.connect(cluster.address) as mesh,
    ):
        first = model(input_ids=batches[0][:, :-1], use_cache=False).logits
        report.gate(case, first[firm].flatten(0, 1), expected[firm].flatten(0, 1), TOLERANCE)
        for batch in batches[1:warm_up] if config.mode == "adaptive" else ():
            model(input_ids=batch[:, :-1], use_cache=False)
            mesh.load()  # waits until the controller has counted the answers
        before = seen = mesh.load().counts
        for batch in batches[warm_up:]:
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            nats += cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
            load = mesh.load()
            new = _difference(load.counts, seen)
            violations.append(sum(map(max_violation, new.values())) / len(new))
            divergences.append(sum(load.divergence.values()) / max(1, len(load.divergence)))
            seen = load.counts
    measured = windows[warm_up * BATCH :, 1:].numel()
    total = _difference(seen, before)
    assert all(int(counts.sum()) == measured * 4 for counts in total.values())
    return Served(
        nats * _NATS / measured,
        [max_violation(counts) for counts in total.values()],
        sum(violations) / len(violations),
        sum(divergences) / len(divergences),
        max(load.max_abs_delta.values(), default=0.0),
    )


def _difference(
    after: dict[int, torch.Tensor], before: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Counts of the layers that gate, since `before`."""
    return {layer: counts - before[layer] for layer, counts in after.items() if counts.sum()}


def add_row(report: Report, case: str, runs: list[Served], frozen: list[Served]) -> None:
    """One setting's row: medians over its repetitions, and what it costs beside frozen."""
    more = [run.bits_per_byte - base.bits_per_byte for run, base in zip(runs, frozen, strict=True)]
    report.add(
        case,
        **{
            "bits per byte": Fine.of([run.bits_per_byte for run in runs]),
            "more than frozen": Fine.of(more),
            "MaxVio": Fine.of([sum(run.maxvio) / len(run.maxvio) for run in runs]),
            "worst layer": Fine.of([max(run.maxvio) for run in runs]),
            "batch MaxVio": Fine.of([run.batch_maxvio for run in runs]),
            "divergence": Fine.of([run.divergence for run in runs]),
            "largest delta": Fine.of([run.max_abs_delta for run in runs]),
        },
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mix", choices=MIXES, default="code-pages")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=30, help="batches of 4096 bytes")
    parser.add_argument("--measured", type=int, default=16, help="batches of 4096 bytes")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    output_options(parser)
    parser.add_argument("--plot", type=Path, help="draws the trade-off there")
    return parser.parse_args()


def _firm(model: torch.nn.Module, ids: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Windows, bool `[W]`, whose logits rounding does not tip: where two experts score as good as
    equal, any other order of additions may choose the other one. Found by noise of a float32's last
    digits on the embeddings; raises WrongOutputError where it tips more than a quarter."""
    generator = torch.Generator().manual_seed(0)
    embedded = model.get_input_embeddings()(ids)
    firm = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(_TIPS):
        noise = 1 + _TIP * torch.randn(embedded.shape, generator=generator)
        logits = model(inputs_embeds=embedded * noise, use_cache=False).logits
        off = (logits - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        firm &= off <= TOLERANCE
    if firm.sum() < 0.75 * len(firm):
        raise WrongOutputError(f"noise tips {int((~firm).sum())} of {len(firm)} windows")
    return firm


@torch.no_grad()
def main() -> None:
    """Serves every setting, prints the table, and writes what was asked for."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    report = Report(
        theme=f"serving-bias-{arguments.mix}",
        title=f"A bias that adapts while serving: {arguments.mix}",
        command=f"python benchmarks/bench_serving_bias.py --mix {arguments.mix}",
        says=_SAYS.format(**vars(arguments)),
        facts=facts(),
    )
    batches = arguments.warm_up + arguments.measured
    drawn = [draw(arguments.mix, batches * BATCH, seed) for seed in range(arguments.repetitions)]
    frozen: list[Served] = []
    for case in sorted(arguments.settings, key=list(SETTINGS).index):
        config = replace(SETTINGS[case], schedule_windows=arguments.warm_up)
        runs = [serve(config, windows, arguments.warm_up, report, case) for windows in drawn]
        frozen = frozen or runs
        add_row(report, case, runs, frozen)
        print(f"{case}: {runs}", file=sys.stderr, flush=True)
        # After every setting: a run takes long, and what is done need not be done again.
        if arguments.hardware:
            report.write(arguments.hardware)
        if arguments.plot:
            draw_trade_off(arguments.plot, report.rows, arguments.mix)
    report.publish(arguments)


if __name__ == "__main__":
    main()
