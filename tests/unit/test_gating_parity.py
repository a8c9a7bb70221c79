"""From equal logits, the same experts with the same weights as transformers' own routers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.checkpoint import FAMILIES as FAMILY_ROWS
from expertmesh.checkpoint import Checkpoint
from expertmesh.checkpoint.config import Config
from expertmesh.gating import Routing, route, select
from expertmesh.model import GateSpec
from tests.checkpoints import FAMILIES, build_config, build_model, make_checkpoint

ROWS = 512
BIASES: dict[str, Callable[[int], torch.Tensor]] = {
    "random": lambda count: torch.randn(count, generator=torch.Generator().manual_seed(5)),
    "negative": lambda count: torch.linspace(-3.0, -1.0, count),
    "tied": lambda count: torch.arange(count) % 3 * 0.5 - 0.75,
    "zero": torch.zeros,
}
BIASED = ("deepseek_v3", "glm4_moe", "kimi_k2")


def moe_layers(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def assert_same_routing(found: Routing, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> None:
    """The same ids in any order, each with its weight."""
    ids, order = found.expert_ids.long().sort(dim=-1)
    expected_ids, expected_order = ids_TK.sort(dim=-1)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(
        found.weights.gather(1, order),
        weights_TK.float().gather(1, expected_order),
        rtol=1e-6,
        atol=1e-6,
    )


@cache
def router_class(family: str) -> Any:
    return type(moe_layers(build_model(family))[0].gate)


@torch.no_grad()
def router_and_spec(family: str, **config_overrides: Any) -> tuple[Any, GateSpec]:
    """A router of `family` whose logits are its input (H = E, identity weight), and our spec."""
    count_key = FAMILY_ROWS[family].num_experts_key
    config = build_config(family, **{count_key: 16, "hidden_size": 16, **config_overrides})
    router = router_class(family)(config)
    router.weight.copy_(torch.eye(16))
    row = FAMILY_ROWS[family]
    spec = row.gate_spec(Config(Path("config.json"), config.to_dict(), row.defaults))
    return router, spec


def random_logits() -> torch.Tensor:
    return torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(6)) * 2


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def opened(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    path = tmp_path_factory.mktemp(family)
    model = make_checkpoint(family, path, hidden_size=64)
    return model, Checkpoint.open(path)


@torch.no_grad()
def test_a_checkpoint_is_routed_as_its_own_model_routes_it(
    opened: tuple[Any, Checkpoint],
) -> None:
    model, checkpoint = opened
    hidden_TH = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(4))
    layers = [layer for layer in checkpoint.spec.layers if layer.gate]
    routers = [block.gate for block in moe_layers(model)]

    for layer, router in zip(layers, routers, strict=True):
        assert layer.gate
        gate = checkpoint.read_gate(layer.index)
        _, weights_TK, ids_TK = router(hidden_TH)
        assert_same_routing(route(hidden_TH, gate, layer.gate, gate.bias), weights_TK, ids_TK)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_is_routed_as_it_routes_itself(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_checkpoint(family, tmp_path, dtype=dtype)
    hidden_TH = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(4)).to(dtype)

    with Checkpoint.open(tmp_path) as checkpoint:
        layer = checkpoint.spec.layers[-1]
        gate = checkpoint.read_gate(layer.index)

    assert layer.gate
    routing = route(hidden_TH, gate, layer.gate, gate.bias)
    logits_TE, weights_TK, ids_TK = moe_layers(model)[-1].gate(hidden_TH)
    boundary = torch.sort(logits_TE.float(), descending=True).values
    if not layer.gate.logits_float32:  # rounded logits tie often, and then transformers may differ
        k = layer.top_k
        clear = boundary[:, k - 1] > boundary[:, k]
        routing = Routing(routing.expert_ids[clear], routing.weights[clear])
        weights_TK, ids_TK = weights_TK[clear], ids_TK[clear]
    assert len(ids_TK) > ROWS // 2
    assert_same_routing(routing, weights_TK, ids_TK)


@torch.no_grad()
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (4, 1), (8, 3)], ids=str)
@pytest.mark.parametrize("biased_family", BIASED)
def test_biased_and_grouped_routers_choose_the_same(
    biased_family: str, groups: tuple[int, int], bias: str
) -> None:
    router, spec = router_and_spec(biased_family, n_group=groups[0], topk_group=groups[1])
    router.e_score_correction_bias.copy_(BIASES[bias](16))
    logits_TE = random_logits()

    _, weights_TK, ids_TK = router(logits_TE)

    found = select(logits_TE, spec, router.e_score_correction_bias)
    assert_same_routing(found, weights_TK, ids_TK)


@torch.no_grad()
@pytest.mark.parametrize("biased_family", BIASED)
def test_rows_whose_scores_are_all_zero_are_weighted_as_the_model_weighs_them(
    biased_family: str,
) -> None:
    router, spec = router_and_spec(biased_family, norm_topk_prob=True)
    logits_TE = random_logits() - 200.0  # of which no sigmoid is left in float32

    _, weights_TK, _ = router(logits_TE)

    assert torch.equal(weights_TK, torch.zeros_like(weights_TK))
    assert torch.equal(select(logits_TE, spec).weights, weights_TK.float())


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "renormalised"])
def test_norm_topk_prob_means_what_it_means_to_the_family(family: str, norm: bool) -> None:
    router, spec = router_and_spec(family, norm_topk_prob=norm)
    logits_TE = random_logits()

    _, weights_TK, ids_TK = router(logits_TE)

    assert_same_routing(select(logits_TE, spec), weights_TK, ids_TK)


@torch.no_grad()
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2_routes_by_its_topk_method(method: str) -> None:
    router, spec = router_and_spec("deepseek_v2", topk_method=method)
    logits_TE = random_logits()

    _, weights_TK, ids_TK = router(logits_TE)

    assert_same_routing(select(logits_TE, spec), weights_TK, ids_TK)
