"""Load on a cluster while something happens to it: every answer is checked. For tests."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

import torch

import expertmesh
from expertmesh import MeshError
from expertmesh.rpc.process import keep_what_is_loaded


@dataclass
class Outcome:
    """What became of every request, with when it ended (monotonic seconds)."""

    right: list[tuple[float, float]] = field(default_factory=list)  # ended at, took
    wrong: list[tuple[float, int]] = field(default_factory=list)  # ended at, layer
    errors: list[tuple[float, float, Exception]] = field(default_factory=list)

    def longest(self, since: float) -> float:
        """Seconds of the longest request that ended after `since`."""
        return max(took for ended, took in self.right if ended >= since)

    def quantile(self, q: float, before: float) -> float:
        """Seconds that a share of `q` of the requests that ended before needed at most."""
        took = sorted(took for ended, took in self.right if ended < before)
        return took[int(q * (len(took) - 1))]

    def most_overtaken(self, since: float) -> int:
        """Most answers that came while one request that ended after `since` waited for its own.

        Told in answers and not in seconds, it is the same on a slow machine: where every client
        has one request in flight and none is held up, about two for each client.
        """
        ends = sorted(ended for ended, _ in self.right)
        return max(
            bisect_left(ends, ended) - bisect_right(ends, ended - took)
            for ended, took in self.right
            if ended >= since
        )

    def longest_silence(self, since: float) -> float:
        """Seconds of the longest time after `since` in which no request was answered right."""
        ends = [since, *sorted(ended for ended, _ in self.right if ended >= since)]
        return max(after - before for before, after in pairwise(ends))


class Load:
    """`clients` threads, each with one request in flight at any time."""

    def __init__(
        self, address: str, model: torch.nn.Module, clients: int, rows: int, timeout: float
    ) -> None:
        self._mesh = expertmesh.connect(address)
        self._timeout = timeout
        width = self._mesh.describe().hidden_size
        self._layers = [layer.index for layer in self._mesh.describe().layers]
        generator = torch.Generator().manual_seed(0)
        self._hidden = [torch.randn(rows, width, generator=generator) for _ in range(clients)]
        with torch.no_grad():
            self._expected = [
                {layer: model.model.layers[layer].mlp(hidden[None])[0] for layer in self._layers}  # type: ignore[union-attr,index]
                for hidden in self._hidden
            ]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.outcome = Outcome()
        self.answered = threading.Condition(self._lock)
        self.answered_layers: list[int] = []  # of every right answer
        self._threads = [
            threading.Thread(target=self._run, args=(client,)) for client in range(clients)
        ]

    def __enter__(self) -> Load:
        # A full garbage collection holds this process up for half a second, with every client in
        # it: that would be taken for a request that was late.
        keep_what_is_loaded()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._mesh.close()

    def wait_right(self, count: int, timeout_s: float) -> None:
        """Until that many more requests have been answered right."""
        with self.answered:
            wanted = len(self.outcome.right) + count
            done = self.answered.wait_for(lambda: len(self.outcome.right) >= wanted, timeout_s)
        assert done, f"{count} right answers did not come within {timeout_s} s"

    def assignments(self, rows: int) -> int:
        """Pairs of row and routed expert in all right answers, of requests of so many rows."""
        top_k = {layer.index: layer.top_k for layer in self._mesh.describe().layers}
        return sum(rows * top_k[layer] for layer in self.answered_layers)

    def suspects(self) -> list[str]:
        """Addresses of routers that do not answer this client."""
        return [link.address for link in self._mesh._mesh._links.values() if link.suspected]

    def _run(self, client: int) -> None:
        turn = client
        while not self._stop.is_set():
            turn += 1
            layer = self._layers[turn % len(self._layers)]
            started = time.monotonic()
            try:
                output = self._mesh.forward(self._hidden[client], layer, timeout=self._timeout)
            except MeshError as error:
                self._note(
                    self.outcome.errors, (time.monotonic(), time.monotonic() - started, error)
                )
                continue
            ended = time.monotonic()
            expected = self._expected[client][layer]
            if torch.allclose(output, expected, rtol=1e-4, atol=1e-5):
                self.answered_layers.append(layer)
                self._note(self.outcome.right, (ended, ended - started))
            else:
                self._note(self.outcome.wrong, (ended, layer))

    def _note(self, where: list, what: tuple) -> None:  # type: ignore[type-arg]
        with self.answered:
            where.append(what)
            self.answered.notify_all()
