"""Counts are exact whatever happens to the reports and to those who send and take them.

Hypothesis plays the network and the operator: reports are lost, repeated and reordered, routers and
servers are killed and start again, and so does the controller, from its file alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from expertmesh.config import BalanceConfig
from expertmesh.model import GateSpec, LayerSpec, ModelSpec
from expertmesh.v1 import control_pb2 as pb
from load_controller.controller import LoadController
from load_controller.store import Store
from router_service.counts import AssignmentCounts

LAYERS, EXPERTS, TOP_K, ROUTERS, SERVERS = (2, 5), 4, 2, 2, 2
SPEC = ModelSpec(
    model_type="t",
    hidden_size=4,
    dtype=torch.float32,
    layers=tuple(
        LayerSpec(
            index=index,
            num_experts=EXPERTS,
            intermediate_size=2,
            shared_intermediate_size=0,
            gate=GateSpec(score="sigmoid", top_k=TOP_K),
        )
        for index in LAYERS
    ),
)
Report = pb.ReportAssignmentsRequest | pb.ReportExecutionsRequest


class _Router:
    """One run of a router: its counts, and its reports as the wire has them."""

    def __init__(self, name: str, incarnation: int) -> None:
        self.counts = AssignmentCounts(SPEC)
        self._key = {"source": name, "incarnation": str(incarnation)}
        self._sequence = 0

    def report(self) -> pb.ReportAssignmentsRequest:
        self._sequence += 1
        report = pb.ReportAssignmentsRequest(sequence=self._sequence, **self._key)
        self.counts.report(report)
        return report


class _Server:
    """One run of a server."""

    def __init__(self, name: str, incarnation: int) -> None:
        self.counts = {layer: np.zeros(EXPERTS, np.int64) for layer in LAYERS}
        self._key = {"source": name, "incarnation": str(incarnation)}
        self._sequence = 0

    def report(self) -> pb.ReportExecutionsRequest:
        self._sequence += 1
        layers = [
            pb.LayerExecutions(layer=layer, counts=counts.tolist())
            for layer, counts in self.counts.items()
        ]
        return pb.ReportExecutionsRequest(sequence=self._sequence, layers=layers, **self._key)


class Accounting(RuleBasedStateMachine):
    """A cluster that only counts, and the truth beside it."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._stores: list[Store] = []
        self._start_controller()
        self._incarnations = 0
        self._routers = [self._router(n) for n in range(ROUTERS)]
        self._servers = [self._server(n) for n in range(SERVERS)]
        self._ended: list[_Router | _Server] = []
        self._on_the_way: list[Report] = []
        self._tokens = {True: dict.fromkeys(LAYERS, 0), False: dict.fromkeys(LAYERS, 0)}
        self._repeats = dict.fromkeys(LAYERS, 0)

    def _start_controller(self) -> None:
        self._stores.append(Store(Path(self._folder.name) / "state.sqlite"))
        balance = BalanceConfig(mode="adaptive", window_tokens=5)
        self._controller = LoadController(self._stores[-1], balance, lambda: None)

    def _router(self, number: int) -> _Router:
        self._incarnations += 1
        return _Router(f"r{number}", self._incarnations)

    def _server(self, number: int) -> _Server:
        self._incarnations += 1
        return _Server(f"s{number}", self._incarnations)

    @rule(
        router=st.integers(0, ROUTERS - 1),
        server=st.integers(0, SERVERS - 1),
        layer=st.sampled_from(LAYERS),
        rows=st.lists(st.sampled_from([(0, 1), (0, 3), (2, 1)]), max_size=6),
        again=st.integers(0, 2),
        caller_gated=st.booleans(),
    )
    def answer(
        self,
        router: int,
        server: int,
        layer: int,
        rows: list[tuple[int, int]],
        again: int,
        caller_gated: bool,
    ) -> None:
        """A request is computed `1 + again` times, and answered once."""
        ids = np.array(rows, np.int32).reshape(-1, TOP_K)
        for _ in range(1 + again):
            self._servers[server].counts[layer] += np.bincount(ids.ravel(), minlength=EXPERTS)
        self._routers[router].counts.add(
            layer, ids, caller_gated=caller_gated, retried=again * ids.size
        )
        self._tokens[caller_gated][layer] += len(rows)
        self._repeats[layer] += again * ids.size

    @rule(sender=st.integers(0, ROUTERS + SERVERS - 1), copies=st.integers(0, 3))
    def send(self, sender: int, copies: int) -> None:
        """A source reports; the network loses it, or makes several of it."""
        report = [*self._routers, *self._servers][sender].report()
        self._on_the_way += [report] * copies

    @precondition(lambda self: self._on_the_way)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Any report on its way arrives, however old."""
        which = data.draw(st.integers(0, len(self._on_the_way) - 1))
        self._take(self._on_the_way.pop(which))

    @rule(number=st.integers(0, ROUTERS - 1), told=st.booleans())
    def end_router(self, number: int, told: bool) -> None:
        self._end(self._routers[number], told)
        self._routers[number] = self._router(number)

    @rule(number=st.integers(0, SERVERS - 1), told=st.booleans())
    def end_server(self, number: int, told: bool) -> None:
        self._end(self._servers[number], told)
        self._servers[number] = self._server(number)

    def _end(self, source: _Router | _Server, told: bool) -> None:
        """Its last report came in, and will not come again; or it is still on its way."""
        if told:
            self._take(source.report())
        else:
            self._ended.append(source)

    @rule()
    def kill_controller(self) -> None:
        """Its memory is gone; the file was never closed."""
        self._start_controller()

    def _take(self, report: Report) -> None:
        if isinstance(report, pb.ReportAssignmentsRequest):
            self._controller.take_assignments(report, now=0.0)
        else:
            self._controller.take_executions(report)

    def teardown(self) -> None:
        """The last report of every source comes in, with what was still on its way behind it."""
        for source in [*self._ended, *self._routers, *self._servers]:
            self._take(source.report())
        for report in self._on_the_way:
            self._take(report)

        load = self._controller.load(now=0.0)

        for store in self._stores:
            store.close()
        self._folder.cleanup()
        for layer in LAYERS:
            entry = next((e for e in load.layers if e.layer == layer), None)
            gated = sum(entry.counts) if entry else 0
            caller = sum(entry.caller_gated_counts) if entry else 0
            repeats = entry.repeated_pairs if entry else 0
            executed = sum(sum(e.counts) for e in load.executions if e.layer == layer)
            assert gated == self._tokens[False][layer] * TOP_K
            assert caller == self._tokens[True][layer] * TOP_K
            assert repeats == self._repeats[layer]
            assert executed - repeats == gated + caller


TestExactCounts = Accounting.TestCase
TestExactCounts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
