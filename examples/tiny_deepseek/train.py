"""Train the tiny DeepSeek-V3 of this folder: 2.7 M weights, on the bytes of the stdlib.

    python -m examples.tiny_deepseek.train --steps 1700 --out build/tiny_deepseek

Experts are balanced without an auxiliary loss, by the same `load_controller.policy.sign` that
serves: after each step the selection bias moves one notch against that step's counts (arXiv
2408.15664).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from examples.tiny_deepseek import corpus
from examples.tiny_deepseek.bytes_text import SEPARATOR
from examples.tiny_deepseek.evaluate import ExpertCounter, measure
from examples.tiny_deepseek.muon import Muon
from load_controller import policy

WARMUP_STEPS = 40
CHECKPOINT_STEPS = 200  # a checkpoint, and a look at a slice of the held-out bytes, this often
PROBE_STRIDE = 16  # of the held-out windows, for that look


def model_config() -> DeepseekV3Config:
    """A DeepSeek-V3 with all its parts (latent attention, a dense layer, group-limited top-k)."""
    return DeepseekV3Config(
        vocab_size=256,
        hidden_size=192,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        intermediate_size=512,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        routed_scaling_factor=2.5,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=48,
        max_position_embeddings=corpus.CONTEXT,
        num_mtp_layers=0,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
    )


def schedule(step: int, steps: int) -> float:
    """Fraction of the peak rate: a short linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(
    model: DeepseekV3ForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embedding, head, norms and gates."""
    inner, outer, gates = [], [], []
    for name, weight in model.named_parameters():
        if "mlp.gate." in name:
            gates.append(weight)
        elif weight.dim() < 2 or "embed_tokens" in name or "lm_head" in name:
            outer.append(weight)
        else:
            inner.append(weight)
    # At the full rate a gate's logits outrun any bias, and every token goes to the same experts.
    groups = [{"params": outer}, {"params": gates, "lr": args.adam_lr / 10}]
    return [
        Muon(inner, lr=args.muon_lr),
        torch.optim.AdamW(groups, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def batches(seed: int, size: int) -> Iterator[torch.Tensor]:
    """Yield `[size, CONTEXT + 1]` for ever; every window is seen once before any is seen twice."""
    pieces = corpus.windows(corpus.load(held_out=False))
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(pieces), generator=generator).split(size):
            if len(chosen) == size:
                yield pieces[chosen]


@torch.no_grad()
def balance(
    model: DeepseekV3ForCausalLM, counts_by_layer: dict[int, torch.Tensor], update_rate: float
) -> None:
    """Move every gate's selection bias against the counts of the step that was just taken."""
    for layer, counts in counts_by_layer.items():
        bias = model.model.layers[layer].mlp.gate.e_score_correction_bias
        bias.copy_(policy.sign(bias, counts, update_rate))


def train_step(
    model: DeepseekV3ForCausalLM, optimizer_list: list[torch.optim.Optimizer], batch: torch.Tensor
) -> float:
    """Take one gradient step and return the loss in bits per byte."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    for optimizer in optimizer_list:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item() / math.log(2)


def train(args: argparse.Namespace) -> DeepseekV3ForCausalLM:
    """Run the schedule, writing a checkpoint to `args.out` now and then and at the last step."""
    torch.manual_seed(args.seed)
    model = DeepseekV3ForCausalLM(model_config())
    # In fp32 on one core the loop over experts trains as fast as grouped_mm (4.5 and 4.7 kB/s)
    # and 30 times as fast as batched_mm; the loop is the plainest of them.
    model.set_experts_implementation("eager")
    model.generation_config.pad_token_id = SEPARATOR
    optimizer_list = optimizers(model, args)
    schedulers = [
        LambdaLR(optimizer, partial(schedule, steps=args.steps)) for optimizer in optimizer_list
    ]
    probe = corpus.windows(corpus.load(held_out=True))[::PROBE_STRIDE]
    source = batches(args.seed, args.batch)
    last = args.steps if args.until is None else min(args.until, args.steps)
    started = time.monotonic()
    with ExpertCounter(model) as counter:
        for step in range(last):
            bits = train_step(model, optimizer_list, next(source))
            counts_by_layer = counter.take()
            # The bias slows down with the weights, so that both come to rest together at the end.
            balance(model, counts_by_layer, args.update_rate * schedule(step, args.steps))
            for scheduler in schedulers:
                scheduler.step()
            record = {"step": step + 1, "seconds": time.monotonic() - started, "train": bits}
            record["maxvio"] = [policy.max_violation(counts) for counts in counts_by_layer.values()]
            if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == last:
                record["held_out"] = measure(model, probe).bits_per_byte
                counter.take()  # what the probe counted is no training step
                model.save_pretrained(args.out)
            if (step + 1) % 20 == 0 or "held_out" in record:
                print(json.dumps(record, default=float), flush=True)
    return model


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1700, help="length of the schedule")
    parser.add_argument("--until", type=int, help="stop at this step, before the schedule ends")
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 bytes a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/tiny_deepseek"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--update-rate", type=float, default=0.01, help="u, at the schedule's peak")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
