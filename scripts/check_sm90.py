"""Compiles every kernel for sm_90 as the shipped tables launch it, and reads what came out.

    python scripts/check_sm90.py [--limit 4] [--tables DIR] [--report benchmarks/results]

Needs no GPU. The launchers run on tensors without storage; each launch is recorded, compiled for an
H100 or H200 and checked: no spilled registers, shared memory of at most 227 KiB, tensor cores fed
by `wgmma` in every tile of 64 rows or more, weights loaded 16 bytes at a time. Exits with 1 where
one of these does not hold. A process of its own: under TRITON_INTERPRET nothing is compiled.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from expert_service.kernels.triton.experts import grouped_swiglu_experts
from expert_service.kernels.triton.matrices import FP8, ExpertMatrices, scale_shape
from expert_service.kernels.triton.products import down, gate_up, quantize, reduce, route
from expert_service.kernels.triton.tables.tables import TABLES, TileTable, read_tables
from expert_service.kernels.triton.tables.tiles import rule_tiles_for

SHARED_BYTES = 227 * 1024  # of a program on sm_90
WIDE = 16  # bytes of the widest load
KERNELS = {
    "route, few pairs": (route, "_small_kernel"),
    "route, histogram": (route, "_histogram_kernel"),
    "route, scan": (route, "_scan_kernel"),
    "route, scatter": (route, "_scatter_kernel"),
    "quantize": (quantize, "_quantize_kernel"),
    "gate_up": (gate_up, "_gate_up_kernel"),
    "down": (down, "_down_kernel"),
    "reduce": (reduce, "_reduce_kernel"),
}
#: Matrices of which a program loads tiles, and the argument that holds the first.
WEIGHTS = {"gate_up": (2, "gate_ptr"), "down": (1, "down_ptr")}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    FP8: "fp8e4nv",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as it is specialised: arguments by name."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16
    num_warps: int
    num_stages: int

    @property
    def precision(self) -> str:
        """Of activations and weights."""
        types = dict(self.signature)
        if self.kernel == "quantize":
            return "w8a8"
        if not any("fp8e4nv" in kind for kind in types.values()):
            return "bf16" if "*bf16" in types.values() else "-"
        rows = next((types[name] for name in ("x_ptr", "h_ptr") if name in types), "")
        return "w8a8" if "fp8e4nv" in rows else "w8a16"

    @property
    def tile(self) -> str:
        """Sizes of blocks, as a table shows them."""
        sizes = dict(self.constants)
        if self.kernel in WEIGHTS:
            return "x".join(str(sizes[f"BLOCK_{side}"]) for side in "MNK")
        shown = ("BLOCK_M", "PAIRS", "BINS", "BLOCK_H", "BLOCK_T", "E", "H", "C", "K")
        return ", ".join(f"{name} {sizes[name]}" for name in shown if name in sizes)

    @property
    def sizes(self) -> str:
        """H x I of the experts, where the kernel is compiled for them."""
        sizes = dict(self.constants)
        return f"{sizes['H']}x{sizes['I']}" if self.kernel in WEIGHTS else ""

    @property
    def weight_bytes(self) -> int:
        """Of the tiles of weights that a program loads at a time."""
        if self.kernel not in WEIGHTS:
            return 0
        matrices, argument = WEIGHTS[self.kernel]
        sizes = dict(self.constants)
        item = 1 if "fp8e4nv" in dict(self.signature)[argument] else 2
        return matrices * int(sizes["BLOCK_N"] * sizes["BLOCK_K"]) * item


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the compiler made of a launch."""

    registers: int
    spilled: int  # bytes of stack and local memory of a thread
    shared: int  # bytes of a program
    wgmma: bool
    wide_loads: int  # instructions that load 16 bytes a thread
    narrow_copies: int  # asynchronous copies of less
    bulk_copies: int  # instructions of the copy engine (TMA)


def faults(launch: Launch, outcome: Outcome) -> list[str]:
    """What is wrong with it; empty if nothing is."""
    found = []
    if outcome.spilled:
        found.append(f"spills {outcome.spilled} bytes a thread")
    if outcome.shared > SHARED_BYTES:
        found.append(f"{outcome.shared} bytes of shared memory, of {SHARED_BYTES}")
    if launch.kernel not in WEIGHTS:
        return found
    if dict(launch.constants)["BLOCK_M"] >= 64 and not outcome.wgmma:
        found.append("no wgmma")
    if dict(launch.constants).get("TMA"):
        return found if outcome.bulk_copies else [*found, "nothing comes by the copy engine"]
    # Each stage of the pipeline has loads of its own.
    loaded = outcome.wide_loads * WIDE * 32 * launch.num_warps
    if outcome.narrow_copies or loaded < launch.weight_bytes * launch.num_stages:
        found.append(f"weights are not loaded {WIDE} bytes at a time")
    return found


class _Recorder:
    """Stands in for a kernel: keeps its launches, and runs nothing."""

    def __init__(self, name: str, kernel: Any, launches: dict[Launch, None]) -> None:
        self._name, self._kernel, self._launches = name, kernel, launches

    def __getitem__(self, _grid: object) -> Any:
        return self._record

    def _record(self, *args: object, **kwargs: Any) -> None:
        options = {"num_warps": 4, "num_stages": 3}  # Triton's own defaults
        options |= {name: kwargs.pop(name) for name in options if name in kwargs}
        values = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = {}, {}, []
        for index, parameter in enumerate(self._kernel.params):
            value, free = values[parameter.name], not parameter.do_not_specialize
            is_one = isinstance(value, int) and value == 1 and free
            if parameter.is_constexpr or value is None or is_one:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                kind = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
                signature[parameter.name] = kind
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                divisible.append(index)
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % WIDE == 0 and free:
                    divisible.append(index)
        launch = Launch(
            self._name,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(divisible),
            **options,
        )
        self._launches[launch] = None


@contextmanager
def _recording() -> Iterator[dict[Launch, None]]:
    """Launches inside are kept, in order, and not run."""
    launches: dict[Launch, None] = {}
    with ExitStack() as stack:
        for name, (module, attribute) in KERNELS.items():
            recorder = _Recorder(name, getattr(module, attribute), launches)
            stack.enter_context(mock.patch.object(module, attribute, recorder))
        yield launches


def by_the_rule(table: TileTable) -> TileTable:
    """The table that the rule would make for the same shard: the fallback of all others."""
    sizes = (table.experts, table.hidden_size, table.intermediate_size)
    entries = [
        (tokens, rule_tiles_for(tokens * table.top_k, sizes, table.precision))
        for tokens, _ in table.entries
    ]
    return replace(table, entries=tuple(entries))


def launches_of(tables: Iterable[TileTable]) -> list[Launch]:
    """Every distinct launch of the tables and of the rule.

    The rule is taken for the tables' shards, and for one expert of each: few programs.
    """
    with _recording() as launches, torch.device("meta"):
        for table in tables:
            _launch_experts(table)
            _launch_experts(by_the_rule(table))
            _launch_experts(by_the_rule(replace(table, experts=1, top_k=1)))
    return list(launches)


def _launch_experts(table: TileTable) -> None:
    count, hidden, size = table.experts, table.hidden_size, table.intermediate_size
    dtype = torch.bfloat16 if table.precision == "bf16" else FP8
    shapes = ((size, hidden), (size, hidden), (hidden, size))
    weights = [torch.empty(count, *shape, dtype=dtype) for shape in shapes]
    if dtype == FP8:
        weights += [torch.empty(count, *scale_shape(*shape)) for shape in shapes]
    for tokens, tiles in table.entries:
        grouped_swiglu_experts(
            torch.empty(tokens, hidden, dtype=torch.bfloat16),
            torch.empty(tokens, table.top_k, dtype=torch.int32),
            torch.empty(tokens, table.top_k),
            ExpertMatrices(*weights),
            torch.empty(count, dtype=torch.int32),
            tiles=tiles,
            w8a8=table.precision == "w8a8",
        )


def pick(launches: Iterable[Launch], limit: int) -> list[Launch]:
    """At most `limit` of each kernel, of each precision in turn the largest first; 0: all."""
    if not limit:
        return list(launches)
    kinds: dict[str, dict[str, list[Launch]]] = defaultdict(lambda: defaultdict(list))
    for launch in launches:
        kinds[launch.kernel][launch.precision].append(launch)
    picked = []
    for precisions in kinds.values():
        ordered = [
            sorted(each, key=lambda launch: -launch.weight_bytes) for each in precisions.values()
        ]
        turns = [launch for turn in zip_longest(*ordered) for launch in turn if launch]
        picked += turns[:limit]
    return picked


def compile_launch(launch: Launch) -> Outcome:
    """Compiles for sm_90, and reads the PTX and the resources of the machine code."""
    module, attribute = KERNELS[launch.kernel]
    source = ASTSource(
        getattr(module, attribute),
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", WIDE]] for index in launch.divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx, usage = compiled.asm["ptx"], _resource_usage(compiled.asm["cubin"])
    return Outcome(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        wgmma="wgmma.mma_async" in ptx,
        wide_loads=len(re.findall(r"cp\.async\.cg\S* .*, 0x10\b|ld\.global\S*\.v4\.\w32 ", ptx)),
        narrow_copies=len(re.findall(r"cp\.async\.c[ag]\S* .*, 0x[48]\b", ptx)),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of a thread, by the name that `cuobjdump` prints."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


_PAGE = """# Kernels compiled for sm_90, without a GPU

`make check-sm90` with Triton {triton}: {count} configurations, {faulty} of them faulty. They are
all that the shipped tables and the tile rule for the same shards and for one of their experts come
to. Nothing was run: this page holds no times.

Checked: no spilled registers, at most 227 KiB of shared memory, `wgmma` in tiles of 64 rows or
more, and weights loaded 16 bytes at a time (counted in the PTX).

"""


def _report(folder: Path, rows: list[tuple[Launch, Outcome, list[str]]]) -> None:
    """Writes the table, and the same as JSON."""
    cells = [
        {
            "kernel": launch.kernel,
            "precision": launch.precision,
            "H x I": launch.sizes,
            "block": launch.tile,
            "transposed": "yes" if dict(launch.constants).get("TRANSPOSED") else "no",
            "tma": "yes" if dict(launch.constants).get("TMA") else "no",
            "warps": launch.num_warps,
            "stages": launch.num_stages,
            "registers": outcome.registers,
            "spilled bytes": outcome.spilled,
            "shared KiB": round(outcome.shared / 1024),
            "wgmma": "yes" if outcome.wgmma else "no",
            "16-byte loads": outcome.wide_loads,
            "faults": "; ".join(wrong) or "none",
        }
        for launch, outcome, wrong in rows
    ]
    cells.sort(key=lambda row: (list(KERNELS).index(row["kernel"]), row["precision"]))
    faulty = sum(row["faults"] != "none" for row in cells)
    page = _PAGE.format(triton=triton.__version__, count=len(cells), faulty=faulty)
    lines = [list(cells[0]), ["---"] * len(cells[0]), *(list(row.values()) for row in cells)]
    page += "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    document = {"triton": triton.__version__, "target": "sm_90", "configurations": cells}
    name = f"sm90_{datetime.date.today():%Y%m}"
    (folder / f"{name}.md").write_text(page)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=0) + "\n")


def main() -> int:
    """0 when nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=0, help="of each kernel; 0: all")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of tables of tiles")
    parser.add_argument("--report", type=Path, help="folder to write sm90_<month>.md and .json to")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, under which nothing is compiled: unset it")

    rows = []
    for launch in pick(launches_of(read_tables(options.tables)), options.limit):
        outcome = compile_launch(launch)
        rows.append((launch, outcome, faults(launch, outcome)))
        for fault in rows[-1][2]:
            print(f"{launch.kernel} {launch.precision} {launch.tile}: {fault}", flush=True)
    faulty = sum(bool(wrong) for _, _, wrong in rows)
    print(f"{len(rows)} configurations compiled for sm_90, {faulty} faulty")
    if options.report:
        _report(options.report, rows)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
