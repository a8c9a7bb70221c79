"""Train one small decoder four ways, three seeds each, and write down how each balanced.

    OMP_NUM_THREADS=1 python -m examples.four_arms.train --out build/four_arms

Arms of one seed share the initial weights, the order of the data, the optimiser and its schedule;
only the gate's score and the balancing differ. Every run writes ARM-SEED.json when it ends, and a
run whose file is there already is not repeated, so an interrupted series is simply started again.
`python -m examples.four_arms.report` makes the table and the plots from whatever has ended.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from examples.four_arms.arms import ARMS, EXPERTS, TOP_K
from examples.four_arms.model import CONTEXT, HIDDEN, INNER, LAYERS, Decoder
from examples.tiny_deepseek import corpus
from load_controller import policy

WARMUP_STEPS = 50
WINDOWS_A_STEP = 32
PROBE_STEPS = 200  # a look at a slice of the held-out bytes this often
PROBE_STRIDE = 8  # of the held-out windows, for that look


@dataclass(frozen=True)
class HeldOut:
    """What a set of windows said about a model, its bias held still."""

    nats_per_byte: float
    maxvio_global: list[float]  # by layer, over all of the windows
    maxvio_batch: float  # mean over batches of the training's size and over layers


def schedule(step: int, steps: int) -> float:
    """Fraction of the peak rate: a linear warm-up, then half a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def mean_violation(counts_LE: torch.Tensor) -> float:
    """MaxVio, averaged over the layers as arXiv 2408.15664 does."""
    return sum(policy.max_violation(counts_E) for counts_E in counts_LE) / len(counts_LE)


@torch.no_grad()
def measure(model: Decoder, windows: torch.Tensor) -> HeldOut:
    """Predict every byte of int64 `[W, CONTEXT + 1]` once."""
    nats, violations = 0.0, []
    total_LE = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for piece in windows.split(WINDOWS_A_STEP):
        result = model(piece[:, :-1])
        nats += cross_entropy(
            result.logits_BSV.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum"
        ).item()
        total_LE += result.counts_LE
        if len(piece) == WINDOWS_A_STEP:
            violations.append(mean_violation(result.counts_LE))
    return HeldOut(
        nats / windows[:, 1:].numel(),
        [policy.max_violation(counts_E) for counts_E in total_LE],
        sum(violations) / max(1, len(violations)),
    )


def optimizer(model: Decoder, rate: float) -> torch.optim.AdamW:
    """AdamW, the gates at a tenth of the rate: at the full one their logits outrun any bias."""
    gates = [weight for name, weight in model.named_parameters() if name.endswith(".gate")]
    others = [weight for name, weight in model.named_parameters() if not name.endswith(".gate")]
    groups = [{"params": others, "lr": rate}, {"params": gates, "lr": rate / 10}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def train_step(
    model: Decoder, adam: torch.optim.Optimizer, batch: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Take one gradient step, move the bias; return nats per byte and the counts `[L, E]`."""
    arm = model.arm
    result = model(batch[:, :-1])
    loss = cross_entropy(result.logits_BSV.flatten(0, 1), batch[:, 1:].flatten())
    (loss + arm.loss_weight * result.loss).backward()
    adam.step()
    adam.zero_grad()
    if arm.update_rate:
        for layer, counts_E in zip(model.layers, result.counts_LE, strict=True):
            layer.bias.copy_(policy.sign(layer.bias, counts_E, arm.update_rate))
    return loss.item(), result.counts_LE


def train(name: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Run one arm with one seed, and return what goes into its file."""
    model = Decoder(ARMS[name], seed)
    adam = optimizer(model, args.rate)
    peaks = [group["lr"] for group in adam.param_groups]
    windows = corpus.windows(corpus.load(held_out=False), CONTEXT)
    held_out = corpus.windows(corpus.load(held_out=True), CONTEXT)
    tokens_a_step = WINDOWS_A_STEP * CONTEXT
    steps = math.ceil(args.tokens / tokens_a_step)
    # A permutation per epoch; at the default size one epoch is longer than the run.
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * WINDOWS_A_STEP / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    losses, violations, probes = [], [], []
    started, probing = time.process_time(), 0.0
    for step in range(steps):
        for group, peak in zip(adam.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, steps)
        chosen = order[step * WINDOWS_A_STEP : (step + 1) * WINDOWS_A_STEP]
        nats, counts_LE = train_step(model, adam, windows[chosen])
        losses.append(round(nats, 5))
        violations.append(round(mean_violation(counts_LE), 4))
        if (step + 1) % PROBE_STEPS == 0:
            before = time.process_time()
            probe = measure(model, held_out[::PROBE_STRIDE])
            probes.append({"step": step + 1, **asdict(probe)})
            probing += time.process_time() - before
            print(name, seed, json.dumps(probes[-1]), flush=True)
    cpu_s = time.process_time() - started - probing
    return {
        "arm": name,
        "seed": seed,
        "tokens": steps * tokens_a_step,
        "epochs": steps * WINDOWS_A_STEP / len(windows),
        "cpu_tokens_per_s": steps * tokens_a_step / cpu_s,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "shape": {
            "layers": LAYERS, "hidden": HIDDEN, "inner": INNER, "context": CONTEXT,
            "experts": EXPERTS, "top_k": TOP_K, "windows_a_step": WINDOWS_A_STEP,
            "rate": args.rate, "loss_weight": ARMS[name].loss_weight,
            "update_rate": ARMS[name].update_rate,
        },
        "held_out_bytes": held_out[:, 1:].numel(),
        "held_out": asdict(measure(model, held_out)),
        "bias": [layer.bias.tolist() for layer in model.layers],
        "train_nats": losses,
        "train_maxvio": violations,
        "probes": probes,
    }  # fmt: skip


def main() -> None:
    """Train what has not been trained yet, all arms of one seed before the next seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/four_arms"))
    parser.add_argument("--tokens", type=int, default=9_400_000, help="of each arm and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rate", type=float, default=0.006, help="AdamW's peak rate")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for name in args.arms:
            path = args.out / f"{name}-{seed}.json"
            if path.exists():
                continue
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(train(name, seed, args)) + "\n")
            partial.rename(path)


if __name__ == "__main__":
    main()
