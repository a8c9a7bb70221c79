"""What the demo does with a running cluster: generate, kill, generate on, count, measure."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from expertmesh.client import Mesh, connect
from expertmesh.errors import ConfigError

Show = Callable[[str], None]
_SEPARATOR = 0  # the example model's only special token: it stands before the first byte of a file
_RPC_SAMPLES = 100


@dataclass(frozen=True, slots=True)
class Generation:
    """One greedy continuation of a prompt."""

    text: str
    token_s: list[float]  # time of each token after the first, whose time is the prompt's

    @property
    def median_ms(self) -> float:
        """Median time of a token, milliseconds."""
        return 1e3 * statistics.median(self.token_s)

    @property
    def longest_ms(self) -> float:
        """The longest time of a token, milliseconds."""
        return 1e3 * max(self.token_s)


@dataclass(frozen=True, slots=True)
class Kill:
    """What happened when a server was killed in mid-generation."""

    server_id: str
    pid: int
    at_token: int
    generation: Generation
    retried_pairs: int


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Everything that the demo shows."""

    prompt: str
    ready_s: float
    reference: Generation
    remote: Generation
    kill: Kill
    rpcs: int
    ffn_layers: int
    forward_passes: int
    rpc_ms: float
    counts: dict[int, list[int]]
    maxvio: dict[int, float]
    client_parameters: int
    model_parameters: int

    @property
    def all_right(self) -> bool:
        """Whether every text equals the one generated in one process."""
        return self.remote.text == self.reference.text == self.kill.generation.text

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "all_right": self.all_right}


def run_demo(
    address: str, path: Path, prompt: str, tokens: int, ready_s: float, show: Show | None
) -> DemoResult:
    """Generates in one process, then through the cluster, then again with a server killed."""
    transformers = _transformers()
    from expertmesh.huggingface import load_without_experts

    whole = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    reference = _generate(whole, prompt, tokens)
    with connect(address) as mesh:
        model = load_without_experts(path, address, dtype=torch.float32).eval()
        with model.expertmesh as attachment:
            remote = _generate(model, prompt, tokens, show)
            in_flight_s = remote.median_ms / 2e3
            kill = _generate_and_kill(mesh, model, prompt, tokens, in_flight_s, show)
            rpcs = attachment.rpcs
        load, info = mesh.load(), mesh.describe()
        rpc_ms = _rpc_ms(mesh, info.layers[-1].index, info.hidden_size)
    return DemoResult(
        prompt=prompt,
        ready_s=ready_s,
        reference=reference,
        remote=remote,
        kill=kill,
        rpcs=rpcs,
        ffn_layers=len(info.layers),
        forward_passes=2 * tokens,
        rpc_ms=rpc_ms,
        counts={layer: counts.tolist() for layer, counts in load.counts.items()},
        maxvio=dict(load.maxvio),
        client_parameters=sum(p.numel() for p in model.parameters() if not p.is_meta),
        model_parameters=sum(p.numel() for p in whole.parameters()),
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("the demo needs transformers: pip install 'expertmesh[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@torch.inference_mode()
def _generate(
    model: Any,
    prompt: str,
    tokens: int,
    show: Show | None = None,
    at: tuple[int, Callable[[], None]] | None = None,
) -> Generation:
    """Greedy decoding with a key-value cache; `at` is (token, what to do before it)."""
    ids = torch.tensor([[_SEPARATOR, *prompt.encode()]])
    cache, times = None, []
    generated = bytearray()
    for index in range(tokens):
        if at is not None and index == at[0]:
            at[1]()
        started = time.perf_counter()
        output = model(ids, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - started)
        cache = output.past_key_values
        token = int(output.logits[0, -1].argmax())
        ids = torch.tensor([[token]])
        generated.append(token)
        if show is not None:
            show(chr(token))
    if show is not None:
        show("\n\n")
    return Generation(bytes(generated).decode(errors="replace"), times[1:])


def _generate_and_kill(
    mesh: Mesh, model: Any, prompt: str, tokens: int, delay_s: float, show: Show | None
) -> Kill:
    """Kills one expert server, with SIGKILL, `delay_s` after a token in mid-text was begun."""
    before = mesh.status()
    victim = before.servers[0]
    at_token = tokens // 2

    def kill() -> None:
        if show is not None:
            show(f"[killing {victim.server_id}]")
        threading.Timer(delay_s, os.kill, (victim.pid, signal.SIGKILL)).start()

    generation = _generate(model, prompt, tokens, show, (at_token, kill))
    retried = mesh.status().retried_pairs - before.retried_pairs
    return Kill(victim.server_id, victim.pid, at_token, generation, retried)


def _rpc_ms(mesh: Mesh, layer: int, hidden_size: int) -> float:
    """Median time of one layer's RPC for one token, milliseconds."""
    row = torch.randn(1, hidden_size)
    times = []
    for _ in range(_RPC_SAMPLES):
        started = time.perf_counter()
        mesh.forward(row, layer)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
