"""How long a plan takes and how even it is: beside the plain greedy algorithm, and simulated.

python benchmarks/bench_planner.py [--hardware 2core-epyc]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

# Before numpy is imported: the seconds of one thread are reported.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
from greedy import published
from harness import Report, Spread, output_options
from machine import facts

from load_controller.planner import Placement, Plan, Server, plan_placement
from load_controller.simulator import Control, FleetSpec, simulate
from load_controller.simulator.generators import make_trace

_T = TypeVar("_T")
_ROUNDS = 3
_SAYS = """\
`plan` is from nothing, `again` from that plan with every expert's load changed by a factor
(log-normal, sigma 0.2), both in processor seconds of one thread, which a busy machine lengthens
less than those on the clock: median (least-largest) of 3. `greedy` is DeepSeek's
published algorithm, written from its description in plain Python, in the same run; theirs is in
torch, so the ratio compares two ways of working and says nothing of their code. MaxVio is over
servers, mean over layers: `contiguous` of the placement that a new cluster begins with, one slot an
expert; then of the greedy placement, which divides rows evenly over copies, and of the plan, with
its weights and with even division. No case gets a time unless the plan by its weights is at least
as even in every layer (`error`). The loads are Zipf's, shuffled in every layer.

The rows that begin with "simulated" are not timed: they are what `simulate` reports for a steady
load, first and once the plan is in force, by even division; `dispatched` is of rows drawn from the
same popularity that go through the router's own `dispatch.plan`, 5,000 pairs a server and layer,
in one batch, which it divides anew over the copies, preferring servers that a row visits anyhow;
the lengths of queues, which it heeds too, are not in it. TensorRT-LLM publishes 1.56 before and
0.11 after for DeepSeek-R1 on 32 GPUs (blog 4, table 1), with a MaxVio of experts of 10.9, which
Zipf's law has at an exponent of 0.6; that load is real, ours is not.

With one slot a server and a copy to spare for every fourth expert (320 servers, 320 slots) no
placement is even: the hottest expert alone is more than a server's part."""


@dataclass(frozen=True, slots=True)
class Case:
    """One size."""

    layers: int
    experts: int
    redundant: int
    servers: int
    exponent: float

    def __str__(self) -> str:
        return (
            f"{self.layers} x {self.experts} + {self.redundant} on {self.servers}, "
            f"Zipf {self.exponent}"
        )


CASES = (
    Case(58, 256, 32, 32, 0.8),
    Case(61, 256, 64, 320, 0.5),
    Case(61, 256, 384, 320, 0.5),
    Case(1, 256, 9_744, 10_000, 0.8),
)
SIMULATED = (
    ("steady:experts=256,layers=8,exponent=0.6,hours=0.1,seed=3,peak=1e5", 9, 32, 32),
    ("steady:experts=256,layers=8,exponent=0.7,hours=0.1,seed=3,peak=1e5", 9, 32, 32),
    ("steady:experts=256,layers=8,exponent=0.8,hours=0.1,seed=3,peak=1e5", 9, 32, 32),
    ("steady:experts=256,layers=1,exponent=0.8,hours=0.05,seed=3,peak=1e7", 2, 10_000, 9_744),
)


def _timed(run: Callable[[], _T], rounds: int = _ROUNDS) -> tuple[_T, Spread]:
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
    return result, Spread.of(seconds)


def _loads(case: Case) -> np.ndarray:
    rng = np.random.default_rng(1)
    zipf = 1e6 / np.arange(1, case.experts + 1) ** case.exponent
    return np.stack([rng.permutation(zipf) for _ in range(case.layers)])


def _contiguous(case: Case, servers: list[Server]) -> Placement:
    owner = np.arange(case.experts) * len(servers) // case.experts
    holds = np.zeros((case.layers, len(servers), case.experts), np.bool_)
    holds[:, owner, np.arange(case.experts)] = True
    return Placement(tuple(server.name for server in servers), holds)


def _maxvio(loads: np.ndarray) -> np.ndarray:
    return loads.max(1) / loads.mean(1) - 1


def measure(report: Report, case: Case) -> None:
    """Gates one size against the greedy algorithm, then adds its row."""
    load = _loads(case)
    servers = [Server(name=f"s{index:05d}") for index in range(case.servers)]
    drift = load * np.random.default_rng(2).lognormal(0, 0.2, load.shape)
    slots = case.experts + case.redundant

    def greedy() -> list[float]:
        return [published(layer, slots, 1, 1, case.servers) for layer in load]

    plan, plan_s = _timed(lambda: plan_placement(load, servers, case.redundant))
    _, again_s = _timed(lambda: plan_placement(drift, servers, case.redundant, plan.placement))
    beside, greedy_s = _timed(greedy, 1)
    ours, theirs = torch.from_numpy(1 + plan.violation_after), 1 + torch.tensor(beside).double()
    report.gate(str(case), ours, torch.minimum(ours, theirs), 1e-9)
    report.add(str(case), **_columns(load, case, servers, plan, np.mean(beside)),
               **{"plan s": plan_s, "again s": again_s, "greedy s": f"{greedy_s.median:.2f}",
                  "greedy / plan": f"{greedy_s.median / plan_s.median:.1f}"})  # fmt: skip


def _columns(
    load: np.ndarray, case: Case, servers: list[Server], plan: Plan, greedy: float
) -> dict[str, object]:
    before = _maxvio(_contiguous(case, servers).even_loads(load)).mean()
    even = _maxvio(plan.placement.even_loads(load)).mean()
    return {
        "contiguous": f"{before:.2f}",
        "greedy": f"{greedy:.4f}",
        "planned": f"{plan.violation_after.mean():.4f}",
        "planned, even division": f"{even:.4f}",
        "dispatched": "",
    }


def measure_simulated(report: Report, name: str, slots: int, servers: int, redundant: int) -> None:
    """One steady trace, first and planned."""
    trace = make_trace(name)
    control = Control(servers=servers, redundant=redundant, plan_every_s=1e9)
    result = simulate(trace, FleetSpec(slots=slots), control)
    exponent = name.partition("exponent=")[2].partition(",")[0]
    case = f"simulated: {trace.layers} x 256 + {redundant} on {servers}, Zipf {exponent}"
    again = simulate(trace, FleetSpec(slots=slots), control) if servers < 1000 else result
    same = torch.tensor([result.maxvio_after, again.maxvio_after]).double()
    report.gate(case, same[:1], same[1:], 0.0)
    dispatched = result.maxvio_dispatched
    blank = dict.fromkeys(("plan s", "again s", "greedy s", "greedy / plan"), "")
    columns = {
        "contiguous": f"{result.maxvio_before:.2f}",
        "greedy": "",
        "planned": "",
        "planned, even division": f"{result.maxvio_after:.4f}",
        "dispatched": "" if dispatched is None else f"{dispatched:.3f}",
    }
    report.add(case, **columns, **blank)


def main() -> None:
    """Plans, prints, and writes results when asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    output_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        "planner",
        "How long a plan takes, and how even it is",
        "python benchmarks/bench_planner.py",
        _SAYS,
        facts(),
    )
    for case in CASES:
        measure(report, case)
    for simulated in SIMULATED:
        measure_simulated(report, *simulated)
    report.publish(arguments)


if __name__ == "__main__":
    main()
