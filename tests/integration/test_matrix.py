"""Every path that rows, dtype, CPU, installation or caller choose, against transformers' block.

Faults hide on paths that no test takes. So the numbers of rows here are those at which the code
chooses, imported from where it does, with their neighbours; and every two values of different axes
stand together in at least one case.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_service import shard
from expert_service.kernels import noop
from expert_service.kernels.cpu import avx512, avx512_experts, onednn, onednn_cpu, onednn_formats
from expertmesh import dispatch, gating
from expertmesh.checkpoint import FAMILIES as FAMILY_ROWS
from expertmesh.client import connect_async
from expertmesh.codec import frames, narrow
from expertmesh.codec.messages import (
    FORWARD_REQUEST,
    FORWARD_RESPONSE,
    ForwardRequest,
    decode_whole,
    encode_whole,
)
from expertmesh.config import BalanceConfig, ExpertConfig, RouterConfig, SharedMemoryConfig
from expertmesh.model import GateWeights, LayerSpec
from expertmesh.request import make_request
from expertmesh.rpc import lending, loop, narrowing
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.narrowing import ask_narrow
from router_service import counts, routing
from router_service.kernels import avx512_gate, avx512_sum
from router_service.server import RouterServer, open_model
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.kernels.hosts import without_bf16
from tests.mesh import LOCAL, LocalMesh, local_mesh, wait_until
from tests.pairwise import Case, pairwise
from tests.wire import TIMEOUT_S, admission, devices_held

E, K = 16, 4
_MOST_OWN_ROWS = 1025  # that the model computes in its own type
#: How often a row's logits are moved by noise that is larger than rounding: a row so near a tie of
#: its gate that rounding may decide changes its experts in some of them, and is left out.
_DRAWS = 48
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Sizes that the code of our own kernels takes, and sizes that it leaves to others.
WIDTHS = {"blocks": (64, 64, 128), "odd": (72, 40, 96)}  # hidden, routed, dense or shared
H = WIDTHS["blocks"][0]  # of the rows at borders that are a number of bytes

_ROUTER, _EXPERT = RouterConfig(), ExpertConfig()
#: Numbers of rows above, or from, which a request takes another path.
_BORDERS = (
    *(_ROUTER.inline_rows, _ROUTER.small_rows, _ROUTER.max_batch_rows),
    *(_EXPERT.merge_rows, _EXPERT.block_rows),
    gating._FEW_SCORES // E,
    gating._MANY_ROWS,
    *(dispatch._LARGE_PAIRS // K, dispatch._COMBINE_ROWS),
    *(counts._FEW_PAIRS // K, shard._FEW_PAIRS // K, shard._FEW_CHECKED // K),
    *(avx512_gate._FEW_ROWS, 2 * avx512_gate._THREAD_ROWS),
    *(avx512._FEW_ROWS, avx512_experts._PIECE_ROWS, avx512_experts._SUM_ROWS),
    *(onednn._MAX_BLOCK, noop._MANY_ROWS),
    narrow._BLOCK_ROWS,
    narrowing._INLINE_ELEMENTS // H,
    *(lending.LEAST_BYTES // (H * size) for size in (2, 4)),
    frames.CHUNK_BYTES // (H * 4),
)
ROWS = sorted(
    {0, 1, 2, 63, 64, 65, 127, 128, 129, 200, 256, 257, 1000, 5000}
    | {rows + step for rows in _BORDERS for step in (-1, 0, 1)}
)

CLUSTERS = pairwise(
    {
        "family": FAMILIES,
        "weights": list(DTYPES),
        "kernels": ["own", "lesser", "none"],  # see `_host`
        "widths": list(WIDTHS),
        "mode": ["frozen", "adaptive"],
        "servers": [(1, 1), (3, 1), (2, 2)],  # shards, replicas
    }
)
AXES: dict[str, Sequence[object]] = {
    "rows": ROWS,
    "dtype": list(DTYPES),  # of the hidden states
    "gate": ["router", "caller", "mixed"],
    "way": ["unary", "grpc", "tcp", "shm"],  # of both hops; "unary" of the first alone
    "wire": [None, "bfloat16", "float8_e4m3fn"],  # between client and router
    "inner_wire": [None, "bfloat16", "float8_e4m3fn"],  # between router and expert servers
}
_PAIRS = pairwise(AXES, among=CLUSTERS)
#: (cluster, case): those of a cluster follow each other.
CASES = [
    (cluster, {name: case[name] for name in AXES})
    for cluster in CLUSTERS
    for case in _PAIRS
    if cluster.items() <= case.items()
]


def _name(case: Case) -> str:
    return "-".join(str(value).replace(" ", "") for value in case.values())


@dataclass
class Cluster:
    """A cluster in this process, the model that it serves, and routers made as they are needed."""

    mesh: LocalMesh
    weights: torch.dtype
    layer: LayerSpec
    gate: GateWeights
    block: Any  # transformers' MoE block
    dense: dict[int, Any]  # a dense one by its layer, if the family has any
    merged: list[int]  # requests in each batch that was routed
    routers: dict[tuple[object, object], RouterServer] = field(default_factory=dict)

    def router(self, way: object, wire: object) -> RouterServer:
        """A router that reaches its expert servers in that way."""
        if (way, wire) not in self.routers:
            self.routers[way, wire] = self._start(way, wire)
        return self.routers[way, wire]

    def _start(self, way: object, wire: object) -> RouterServer:
        config = RouterConfig(
            wire_dtype=wire,  # type: ignore[arg-type]
            data_connections="auto" if way == "tcp" else "off",
            shared_memory=SharedMemoryConfig(mode="auto" if way == "shm" else "off"),
        )

        async def start() -> RouterServer:
            router = RouterServer(
                open_model(self.mesh.path, self.mesh.servers[0]._dtype),
                router_id=f"router-{way}-{wire}",
                controller=self.mesh.controller.address,
                host="127.0.0.1",
                rpc=LOCAL,
                config=config,
            )
            await router.start()
            return router

        router = loop.run(start())
        self.mesh.routers.append(router)
        wait_until(lambda: not router.router.missing(), 20.0, "ready")
        return router

    def rows_apart(self, count: int, dtype: torch.dtype, wire: torch.dtype | None) -> torch.Tensor:
        """Rows that the wire does not change, of which no rounding changes the experts."""
        generator = torch.Generator().manual_seed(count)
        hidden_size = self.gate.weight.shape[1]
        drawn = torch.randn(2 * count + 32, hidden_size, generator=generator).to(dtype)
        hidden = narrow.widened(*narrow.narrowed(drawn, wire), dtype)
        spec = self.layer.gate
        assert spec is not None
        logits = gating.logits(hidden.float(), self.gate, spec)
        rounding = 1e-5 if spec.logits_float32 else max(1e-5, 2 * torch.finfo(dtype).eps)

        def chosen(noise: float) -> torch.Tensor:
            moved = noise * (1.0 + logits.abs()) * torch.randn(logits.shape, generator=generator)
            return gating.choose(gating.scores(logits + moved, spec), spec, self.gate.bias).sort(1)[
                0
            ]

        first = chosen(0.0)
        apart = torch.stack([(chosen(rounding) == first).all(1) for _ in range(_DRAWS)]).all(0)
        hidden = hidden[apart][:count]
        assert len(hidden) == count
        return hidden


@contextmanager
def _host(kernels: object) -> Iterator[None]:
    """ "own": this CPU, with our kernels where it has any. "lesser": one without bfloat16. "none":
    without llvmlite, and a torch without oneDNN."""
    compiled = (avx512.compile_kernels, avx512_gate._compile, avx512_sum.create_avx512_sum)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if kernels == "lesser":
            stack.enter_context(without_bf16())
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        elif kernels == "none":
            find = importlib.util.find_spec
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name, *rest: None if name == "llvmlite" else find(name, *rest),
            )
            for module in (onednn_cpu, onednn_formats):
                patch.setattr(module, "has_packed_ops", lambda: False)
        for each in compiled:
            each.cache_clear()
        try:
            yield
        finally:
            for each in compiled:
                each.cache_clear()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], Cluster]]:
    """What gives a case its cluster: the one that runs, as long as cases ask for the same.

    No parameter of a fixture: pytest ends a fixture when the number of its parameter changes, and
    each case has its own.
    """
    begun: list[Case] = []
    running: list[Cluster] = []
    with ExitStack() as stack:

        def start(wanted: Case) -> Cluster:
            if not running or begun[-1] != wanted:
                assert wanted not in begun, "the cases of a cluster follow each other"
                running.clear()
                stack.close()
                path = tmp_path_factory.mktemp("checkpoint")
                running.append(stack.enter_context(_cluster(wanted, path)))
                begun.append(wanted)
            return running[0]

        yield start


@contextmanager
def _cluster(wanted: Case, path: Path) -> Iterator[Cluster]:
    weights = DTYPES[str(wanted["weights"])]
    model = _make_model(str(wanted["family"]), path, weights, str(wanted["widths"]))
    shards, replicas = wanted["servers"]  # type: ignore[misc]
    # Deltas move, and are too small to change a choice.
    balance = BalanceConfig(mode=wanted["mode"], max_delta=1e-9)  # type: ignore[arg-type]
    route_batch, merged = routing.route_batch, list[int]()

    def spy(requests: Sequence[ForwardRequest], *rest: Any) -> Any:
        merged.append(len(requests))
        return route_batch(requests, *rest)

    with (
        _host(wanted["kernels"]),
        pytest.MonkeyPatch.context() as patch,
        local_mesh(path, shards, replicas, balance=balance) as mesh,
    ):
        patch.setattr(routing, "route_batch", spy)
        served = open_model(path)
        layer = next(layer for layer in reversed(served.spec.layers) if layer.gate)
        dense = [layer.index for layer in served.spec.layers if not layer.gate][:1]
        blocks = [each.mlp for each in model.model.layers]
        yield Cluster(
            mesh,
            weights,
            layer,
            served.gates[layer.index],
            blocks[layer.index],
            {index: blocks[index] for index in dense},
            merged,
        )


def _make_model(family: str, path: Path, dtype: torch.dtype, widths: str) -> Any:
    """A checkpoint of E experts, K of them chosen, of which it is the model."""
    hidden, routed, other = WIDTHS[widths]
    sizes = {FAMILY_ROWS[family].num_experts_key: E, "num_experts_per_tok": K}
    sizes["hidden_size"] = hidden
    if FAMILY_ROWS[family].width_key == "moe_intermediate_size":
        sizes |= {"moe_intermediate_size": routed, "intermediate_size": other}
    else:
        sizes["intermediate_size"] = routed
    if family == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = other
    return make_checkpoint(family, path, dtype=dtype, **sizes)


@pytest.mark.parametrize(
    ("wanted", "case"),
    [pytest.param(cluster, case, id=_name({**cluster, **case})) for cluster, case in CASES],
)
def test_every_two_choices_together_give_what_the_block_gives(
    started: Callable[[Case], Cluster], wanted: Case, case: Case
) -> None:
    cluster = started(wanted)
    rows, dtype = case["rows"], DTYPES[str(case["dtype"])]
    assert isinstance(rows, int)
    wire = narrow.wire_dtype(case["wire"])  # type: ignore[arg-type]
    narrower = wire is not None and wire.itemsize < dtype.itemsize
    seen = torch.bfloat16 if narrower else dtype  # by the router: FP8 comes to it as bfloat16
    hidden = cluster.rows_apart(rows, seen, wire)
    # Where weights and hidden states have one type, as the model itself computes; but of many rows
    # in float32, as CPUs take seconds for them in types that they have no instructions for.
    is_own = seen == cluster.weights and rows <= _MOST_OWN_ROWS
    exact = seen if is_own else torch.float32
    expected, ids, weights = _block(cluster.block, hidden.to(exact))
    hidden = hidden.to(dtype)
    by_router: Any = {}
    by_caller: Any = {"expert_ids": ids, "expert_weights": weights, "shared": True}
    asked = {
        "router": [by_router],
        "caller": [by_caller],
        "mixed": [by_router, by_caller, by_router, by_caller, by_router],
    }[str(case["gate"])]
    within = max(map(_within, (seen, cluster.weights, dtype))) + sum(
        map(_within, filter(None, (wire, narrow.wire_dtype(case["inner_wire"]))))  # type: ignore[arg-type]
    )

    outputs = _ask(cluster, case, hidden, cluster.layer.index, asked)
    merged = max(cluster.merged, default=0)
    for index, block in cluster.dense.items():
        (output,) = _ask(cluster, case, hidden, index, [by_router])
        assert_near(output, _block(block, hidden.to(exact))[0], dtype, within)

    assert len(outputs) == len(asked)
    for output in outputs:
        assert_near(output, expected, dtype, within)
    if len(asked) > 1 and 0 < rows <= _ROUTER.small_rows:
        assert merged > 1, "no two requests were merged"


def assert_near(
    output: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, within: float
) -> None:
    """The answer in its caller's type, and its relative error, norm over norm."""
    assert (output.dtype, output.shape) == (dtype, expected.shape)
    wanted = expected.double()
    assert float((output.double() - wanted).norm()) <= within * float(wanted.norm())


def _within(dtype: torch.dtype) -> float:
    """How far off an answer may be for what computes, or travels, in that type."""
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, narrow.FP8: 0.06}[dtype]


@torch.no_grad()
def _block(block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    """A block's output [T, H], and the ids and weights [T, K] that its gate chooses, if it has one,
    all computed in the type of `hidden`."""
    cast = copy.deepcopy(block).to(hidden.dtype)
    if hasattr(getattr(block, "gate", None), "e_score_correction_bias"):
        cast.gate.e_score_correction_bias = block.gate.e_score_correction_bias.float()
    if not len(hidden):
        return hidden, torch.empty(0, K, dtype=torch.int32), torch.empty(0, K)
    if not hasattr(block, "gate"):
        return cast(hidden[None])[0], None, None
    _, weights, ids = cast.gate(hidden)
    return cast(hidden[None])[0], ids, weights


def _ask(
    cluster: Cluster, case: Case, hidden: torch.Tensor, layer: int, asked: Sequence[dict[str, Any]]
) -> list[torch.Tensor]:
    """The answers to requests that are all under way before the first of them is answered."""
    router = cluster.router(case["way"], case["inner_wire"])
    cluster.merged.clear()
    with ExitStack() as stack:
        if len(asked) > 1 and len(hidden):
            stack.enter_context(devices_held(cluster.mesh))
        answers = loop.submit(_forward(router.address, case, hidden, layer, asked))
        if len(asked) > 1 and len(hidden):
            wait_until(lambda: admission(router).frames == len(asked), TIMEOUT_S, "under way")
        stack.close()
        return answers.result(TIMEOUT_S)


async def _forward(
    address: str, case: Case, hidden: torch.Tensor, layer: int, asked: Sequence[dict[str, Any]]
) -> list[torch.Tensor]:
    wire: Any = case["wire"]
    if case["way"] == "unary":
        return await _unary(address, narrow.wire_dtype(wire), hidden, layer, asked)
    async with connect_async(
        address,
        wire_dtype=wire,
        data_connections="auto" if case["way"] == "tcp" else "off",
        shared_memory="auto" if case["way"] == "shm" else "off",
    ) as mesh:
        for other in mesh._links.keys() - {address}:  # found, but not of this case
            await mesh._links.pop(other).close()
        stream = await mesh._links[address].stream()
        await stream.settled()  # else the first requests go over gRPC
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(mesh.forward(hidden, layer, **each)) for each in asked]
    return [task.result() for task in tasks]


async def _unary(
    address: str,
    wire: torch.dtype | None,
    hidden: torch.Tensor,
    layer: int,
    asked: Sequence[dict[str, Any]],
) -> list[torch.Tensor]:
    """As a foreign client asks: one whole message each way."""
    async with open_channel(address) as channel:
        call = channel.unary_unary("/expertmesh.v1.RouterService/Forward")

        async def forward(
            expert_ids: Any = None, expert_weights: Any = None, shared: bool = False
        ) -> torch.Tensor:
            request = make_request(hidden, layer, expert_ids, expert_weights, shared, "refuse")

            async def ask(sent: Any) -> Any:
                answer = await call(encode_whole(FORWARD_REQUEST, sent), timeout=TIMEOUT_S)
                return decode_whole(FORWARD_RESPONSE, answer, 1 << 30)

            asking = ask(request) if wire is None else ask_narrow(request, wire, "it", ask)
            return (await asking).hidden_states

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(forward(**each)) for each in asked]
    return [task.result() for task in tasks]
