"""Measure a tiny DeepSeek on the held-out files: bits per byte, and MaxVio of every layer.

python -m examples.tiny_deepseek.evaluate [FOLDER]
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3ForCausalLM

from examples.tiny_deepseek import corpus
from examples.tiny_deepseek.bytes_text import decode, encode
from load_controller import policy


class ExpertCounter:
    """Counts, while entered, how many tokens every gate of a model gives to every expert."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        layers = enumerate(model.model.layers)
        self._gates = {i: layer.mlp.gate for i, layer in layers if hasattr(layer.mlp, "gate")}
        self._counts = self._zeros()

    def __enter__(self) -> "ExpertCounter":
        self._hooks = [
            gate.register_forward_hook(
                lambda _gate, _args, output, layer=layer: self._add(layer, output[2])
            )
            for layer, gate in self._gates.items()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[int, torch.Tensor]:
        """Return the counts `[E]` by layer since the last call, and start again from zero."""
        taken, self._counts = self._counts, self._zeros()
        return taken

    def _add(self, layer: int, chosen: torch.Tensor) -> None:
        self._counts[layer] += torch.bincount(
            chosen.flatten(), minlength=self._gates[layer].num_experts
        )

    def _zeros(self) -> dict[int, torch.Tensor]:
        return {
            layer: torch.zeros(gate.num_experts, dtype=torch.int64)
            for layer, gate in self._gates.items()
        }


@dataclass(frozen=True)
class Measurement:
    """What a set of windows said about a model."""

    bits_per_byte: float
    counts: dict[int, torch.Tensor]  # tokens given to each expert, by layer


@torch.no_grad()
def measure(model: DeepseekV3ForCausalLM, windows: torch.Tensor, batch: int = 16) -> Measurement:
    """Predict every byte of `[W, CONTEXT + 1]` once, each window starting from nothing."""
    nats = 0.0
    with ExpertCounter(model) as counter:
        for piece in windows.split(batch):
            logits = model(input_ids=piece[:, :-1], use_cache=False).logits
            targets = piece[:, 1:].flatten()
            nats += cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
        counts = counter.take()
    return Measurement(nats / windows[:, 1:].numel() / math.log(2), counts)


def report(name: str, result: Measurement) -> None:
    """Print one split's score and the balance of every layer over all of its bytes."""
    balance = "  ".join(
        f"layer {layer}: {policy.max_violation(counts):.3f}"
        for layer, counts in result.counts.items()
    )
    print(f"{name:9} bits per byte {result.bits_per_byte:.4f}  MaxVio {balance}", flush=True)


def continue_text(model: DeepseekV3ForCausalLM, prompt: str, temperature: float) -> str:
    """Write on from a prompt, as far as the context goes; temperature 0 is greedy."""
    ids = encode(prompt)
    sampling = {"temperature": temperature, "top_k": 0} if temperature > 0 else {}
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=corpus.CONTEXT - ids.shape[1],
        do_sample=temperature > 0,
        **sampling,
    )
    return decode(written)


def main() -> None:
    """Print scores on held-out files and as many training bytes, then greedy and sampled text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--prompt", default="class ")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = DeepseekV3ForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    held_out = corpus.windows(corpus.load(held_out=True))
    training = corpus.windows(corpus.load(held_out=False))
    print(f"{held_out[:, 1:].numel()} held-out bytes in windows of {corpus.CONTEXT}")
    report("held-out", measure(model, held_out))
    report("training", measure(model, training[:: len(training) // len(held_out)]))
    for temperature in (0.0, 0.7):
        print(f"--- temperature {temperature}")
        print(continue_text(model, args.prompt, temperature))


if __name__ == "__main__":
    main()
