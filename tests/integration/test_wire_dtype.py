"""Hidden states that travel narrower than their caller has them, over a whole cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3ForCausalLM

import expertmesh
from examples.tiny_deepseek import corpus
from expertmesh.codec import messages, narrow
from expertmesh.codec.messages import ExecuteRequest
from expertmesh.config import RouterConfig
from expertmesh.errors import ConfigError, InternalError, InvalidRequestError
from expertmesh.huggingface import attach, load_without_experts
from expertmesh.rpc import loop
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.stream import FrameStream
from tests.checkpoints import make_checkpoint
from tests.mesh import LocalMesh, local_mesh, wait_until
from tests.rows import H, rows
from tests.wire import admission, devices_held, wait_until_idle

E, K = 16, 4
MOE = 1
#: Relative error of an answer, whole: of one narrow hop, request and answer.
WITHIN = {"bfloat16": 6e-3, "float8_e4m3fn": 0.06}
EXAMPLE = Path(__file__).parents[2] / "examples/tiny_deepseek"
wires = pytest.mark.parametrize("wire", WITHIN)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    path = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint("deepseek_v3", path)
    with local_mesh(path, backend="reference") as cluster:
        cluster.model = model
        yield cluster


@pytest.fixture(scope="module", params=WITHIN)
def narrow_shards(request: pytest.FixtureRequest, mesh: LocalMesh) -> Iterator[LocalMesh]:
    """A cluster whose router speaks to its expert servers in a narrow type."""
    config = RouterConfig(wire_dtype=request.param)
    with local_mesh(mesh.path, backend="reference", router_config=config) as cluster:
        yield cluster


def outlier_heavy(count: int) -> torch.Tensor:
    """A few channels are a hundred times as large as the others, as in trained models."""
    hidden = rows(count)
    hidden[:, [3, 17, 40]] *= 100.0
    return hidden


def gates(count: int) -> dict[str, torch.Tensor]:
    """The caller's own: so that rounding chooses nobody else."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(count, E, generator=generator).argsort(1)[:, :K].int()
    return {"expert_ids": ids, "expert_weights": torch.rand(count, K, generator=generator)}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@wires
@pytest.mark.parametrize("hidden", [rows(130), outlier_heavy(130)], ids=["normal", "outliers"])
def test_an_answer_is_as_near_as_the_documentation_says(mesh, wire, hidden) -> None:
    with (
        expertmesh.connect(mesh.address) as exact,
        expertmesh.connect(mesh.address, wire_dtype=wire) as client,
    ):
        wanted = exact.forward(hidden, MOE, **gates(130))

        got = client.forward(hidden, MOE, **gates(130))

    assert (got.dtype, got.shape) == (hidden.dtype, hidden.shape)
    assert 1e-4 < error(got, wanted) <= WITHIN[wire]


@dtypes
@wires
def test_the_answer_has_the_callers_dtype_and_shape(mesh, wire, dtype) -> None:
    hidden = rows(6).to(dtype).view(2, 3, H)
    with expertmesh.connect(mesh.address, wire_dtype=wire) as client:
        got = client.forward(hidden, MOE)
        alone = client.forward(hidden[1:], MOE)
        empty = client.forward(hidden[:, :0], MOE)

    assert (got.dtype, got.shape) == (dtype, hidden.shape)
    torch.testing.assert_close(alone, got[1:], rtol=0.05, atol=0.05)
    assert (empty.dtype, empty.shape) == (dtype, (2, 0, H))


@pytest.mark.parametrize("hidden", [rows(130), outlier_heavy(130)], ids=["normal", "outliers"])
def test_partial_sums_may_travel_narrow_too(mesh, narrow_shards, hidden) -> None:
    wire = narrow_shards.routers[0].router._config.wire_dtype
    with (
        expertmesh.connect(mesh.address) as exact,
        expertmesh.connect(narrow_shards.address) as client,
    ):
        wanted = exact.forward(hidden, MOE, **gates(130), shared=True)

        got = client.forward(hidden, MOE, **gates(130), shared=True)

    assert got.dtype == torch.float32
    assert 1e-4 < error(got, wanted) <= WITHIN[wire]


def test_narrow_hops_one_after_the_other_add_little(mesh, narrow_shards) -> None:
    wire = narrow_shards.routers[0].router._config.wire_dtype
    with (
        expertmesh.connect(mesh.address) as exact,
        expertmesh.connect(narrow_shards.address, wire_dtype=wire) as client,
    ):
        wanted = exact.forward(rows(130), MOE, **gates(130))

        got = client.forward(rows(130), MOE, **gates(130))

    assert error(got, wanted) <= 1.5 * WITHIN[wire]


@pytest.mark.parametrize(("wire", "size"), [(None, 4), ("bf16", 2), ("fp8", 1)], ids=str)
def test_the_wire_carries_that_many_bytes_an_element(mesh, wire, size) -> None:
    with devices_held(mesh), expertmesh.connect(mesh.address, wire_dtype=wire) as client:
        call = loop.submit(client._mesh.forward(rows(50), MOE))
        wait_until(lambda: admission(mesh.routers[0]).frames == 1, 5.0, "in flight")
        held = admission(mesh.routers[0]).bytes
        call.cancel()
        wait_until_idle(mesh)

    assert held == 50 * H * size


def test_requests_of_every_type_at_once_are_each_answered_in_their_own(mesh) -> None:
    """FP8 rows become bfloat16 and share its batches; float32 ones never do."""
    hidden = [rows(5, seed) for seed in range(24)]
    kinds: list[tuple[str | None, torch.dtype]] = [
        (None, torch.float32),
        ("fp8", torch.float32),
        ("bf16", torch.float32),
        (None, torch.bfloat16),
        ("fp8", torch.bfloat16),
        ("fp8", torch.float16),
    ]

    with ExitStack() as stack:
        clients = {
            wire: stack.enter_context(expertmesh.connect(mesh.address, wire_dtype=wire))
            for wire in (None, "fp8", "bf16")
        }
        with devices_held(mesh):  # all but the first few wait, and leave merged
            calls = []
            for index, each in enumerate(hidden):
                wire, dtype = kinds[index % len(kinds)]
                request = clients[wire]._mesh.forward(each.to(dtype), MOE, **gates(5))
                calls.append(loop.submit(request))
            wait_until(lambda: admission(mesh.routers[0]).frames == 24, 5.0, "in flight")
        answers = [call.result(10.0) for call in calls]

    with expertmesh.connect(mesh.address) as exact:
        for index, (each, got) in enumerate(zip(hidden, answers, strict=True)):
            wire, dtype = kinds[index % len(kinds)]
            wanted = exact.forward(each, MOE, **gates(5))
            assert got.dtype == dtype
            within = WITHIN["float8_e4m3fn" if wire == "fp8" else "bfloat16"]
            assert error(got, wanted) <= (1e-5 if (wire, dtype) == kinds[0] else 1.5 * within)


def test_an_unknown_wire_dtype_is_refused_before_anything_is_sent(mesh) -> None:
    with pytest.raises(InvalidRequestError, match="wire_dtype is 'int8', expected"):
        expertmesh.connect(mesh.address, wire_dtype="int8")
    with pytest.raises(ConfigError, match=r"router.wire_dtype is 'int8', expected"):
        RouterConfig(wire_dtype="int8")


def test_an_expert_server_checks_scales_and_answers_in_fp8(mesh) -> None:
    server = mesh.servers[0]
    held = int(server.shard.held(MOE).nonzero()[0])
    ids, weights = np.full((3, 1), held, np.int32), np.ones((3, 1), np.float32)
    elements, scale = narrow.narrowed(rows(3), narrow.FP8)
    partial = server.shard.execute(
        MOE, narrow.widened(elements, scale, torch.float32), ids, weights
    )

    async def ask(scale: torch.Tensor | None) -> messages.ExecuteResponse:
        channel = open_channel(server.endpoint)
        path = "/expertmesh.v1.ExpertService/ExecuteStream"
        stream = FrameStream(
            channel, path, messages.EXECUTE_REQUEST, messages.EXECUTE_RESPONSE, "shard"
        )
        request = ExecuteRequest(
            layer=MOE,
            hidden_states=elements,
            expert_ids=ids,
            expert_weights=weights,
            epoch=1 << 40,
            hidden_states_scale=scale,
        )
        try:
            answer: messages.ExecuteResponse = await stream.call(request, Deadline.after(10.0))
            return answer
        finally:
            await stream.close()
            await channel.close()

    answer = loop.run(ask(scale))

    assert answer.hidden_states.dtype == narrow.FP8
    got = narrow.widened(answer.hidden_states, answer.hidden_states_scale, torch.float32)
    assert error(got, partial) <= WITHIN["float8_e4m3fn"]
    with pytest.raises(InvalidRequestError, match=r"expected \[3\]"):
        loop.run(ask(scale[:2]))


def test_an_answer_without_its_scales_is_the_routers_fault(mesh, monkeypatch) -> None:
    encode = messages.ForwardResponseCodec.encode

    def forget(self: object, message: messages.ForwardResponse, length: int) -> tuple[bytes, bytes]:
        message.hidden_states_scale = None
        return encode(self, message, length)  # type: ignore[arg-type]

    monkeypatch.setattr(messages.ForwardResponseCodec, "encode", forget)
    with (
        expertmesh.connect(mesh.address, wire_dtype="fp8") as client,
        pytest.raises(InternalError, match="a router gave an answer that cannot be"),
    ):
        client.forward(rows(3), MOE)


@wires
def test_an_attached_model_predicts_as_well_over_a_narrow_wire(wire) -> None:
    """Bits per byte of the example model; docs/protocol.md has them of more windows."""
    windows = corpus.windows(corpus.load(held_out=True))[:6]
    model = DeepseekV3ForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    exact = bits_per_byte(model, windows)

    with local_mesh(EXAMPLE, backend="reference") as cluster:
        with attach(model, cluster.address, wire_dtype=wire):
            attached = bits_per_byte(model, windows)
        with load_without_experts(EXAMPLE, cluster.address, wire_dtype=wire).expertmesh as loaded:
            assert loaded.mesh._mesh._wire_dtype == narrow.wire_dtype(wire)

    assert attached != exact
    assert abs(attached - exact) <= (0.001 if wire == "bfloat16" else 0.01)


@torch.no_grad()
def bits_per_byte(model: DeepseekV3ForCausalLM, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return float(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())) / math.log(2)
