"""The router against servers that wait: one batch, one snapshot."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import torch

from expertmesh.codec.messages import ForwardRequest, ForwardResponse
from expertmesh.config import RouterConfig
from expertmesh.model import GateSpec, GateWeights, LayerSpec, ModelSpec
from expertmesh.rpc.deadline import Deadline
from router_service.router import Router
from router_service.snapshot import Model, Snapshot
from tests.fakes import FakePool, FakeServer

HIDDEN, EXPERTS = 4, 3
LAYER = LayerSpec(
    index=0,
    num_experts=EXPERTS,
    intermediate_size=2,
    shared_intermediate_size=0,
    gate=GateSpec(score="sigmoid", top_k=1, logits_float32=True),
)
SPEC = ModelSpec(model_type="t", hidden_size=HIDDEN, dtype=torch.float32, layers=(LAYER,))
GATE = GateWeights(torch.zeros(EXPERTS, HIDDEN), torch.tensor([0.3, 0.2, 0.1]), None)


def _request(k: int = 0) -> ForwardRequest:
    hidden = torch.ones(2, HIDDEN)
    ids = torch.arange(k, dtype=torch.int32).repeat(2, 1) if k else None
    weights = torch.ones(2, k) if k else None
    return ForwardRequest(
        layer=0, hidden_states=hidden, expert_ids=ids, expert_weights=weights, want_detail=True
    )


def _router(silent_s: float, **config: int) -> Router:
    pool = FakePool({"a": FakeServer({0, 1, 2}, lambda call: silent_s)}, 0, EXPERTS)
    model = Model(SPEC, {0: GATE}, "digest", torch.float32)
    router = Router(model, pool, RouterConfig(**config))  # type: ignore[arg-type]
    router.snapshot = Snapshot(pool.slots, bias_version=1)
    return router


def _ids(response: ForwardResponse) -> list[list[int]]:
    assert response.expert_ids is not None
    return response.expert_ids.tolist()


def test_a_batch_keeps_the_snapshot_it_began_with_and_the_next_takes_the_new_one() -> None:
    async def scenario() -> tuple[ForwardResponse, ForwardResponse]:
        router = _router(silent_s=0.02)
        first = asyncio.ensure_future(router.forward(_request(), Deadline.after(5.0)))
        await asyncio.sleep(0)  # it has been queued ...
        await asyncio.sleep(0)  # ... and its batch has begun
        router.snapshot = replace(
            router.snapshot, bias_version=2, biases={0: torch.tensor([0.0, 0.0, 9.0])}
        )
        answers = await first, await router.forward(_request(), Deadline.after(5.0))
        await router.close()
        return answers

    before, after = asyncio.run(scenario())

    assert (before.bias_version, _ids(before)) == (1, [[0], [0]])
    assert (after.bias_version, _ids(after)) == (2, [[2], [2]])


def test_a_request_of_few_rows_does_not_wait_for_large_ones() -> None:
    async def scenario() -> list[str]:
        router = _router(silent_s=0.02, small_rows=2)
        finished: list[str] = []

        async def ask(name: str, rows: int) -> None:
            request = ForwardRequest(layer=0, hidden_states=torch.ones(rows, HIDDEN))
            await router.forward(request, Deadline.after(5.0))
            finished.append(name)

        large = [asyncio.ensure_future(ask(f"large {i}", rows=3)) for i in range(4)]
        await asyncio.sleep(0)  # two are under way, two wait
        await asyncio.gather(ask("small", rows=1), *large)
        await router.close()
        return finished

    finished = asyncio.run(scenario())

    assert finished.index("small") < 3, "the large ones that wait are behind it"


def test_detail_is_as_wide_as_the_request_whatever_it_was_merged_with() -> None:
    async def scenario() -> list[ForwardResponse]:
        router = _router(silent_s=0.01)
        far = Deadline.after(5.0)
        asks = [router.forward(_request(k), far) for k in (0, 0, 3, 0, 2)]
        answers = list(await asyncio.gather(*asks))
        await router.close()
        return answers

    widths = [len(_ids(answer)[0]) for answer in asyncio.run(scenario())]

    assert widths == [1, 1, 3, 1, 2]


def test_answers_are_counted_by_who_gated() -> None:
    async def scenario() -> Router:
        router = _router(silent_s=0.0)
        await router.forward(_request(), Deadline.after(5.0))
        await router.forward(_request(k=2), Deadline.after(5.0))
        await router.close()
        return router

    counts = asyncio.run(scenario()).counts

    assert counts._gated[0].tolist() == [2, 0, 0]
    assert counts._caller[0].tolist() == [2, 2, 0]
    assert counts.answered_requests == 2
