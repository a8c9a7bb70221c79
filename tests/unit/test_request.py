"""What the client refuses by itself, and what it sends for odd but right arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import expertmesh
from expertmesh.errors import ConfigError, InvalidRequestError
from expertmesh.request import deadline_after, make_request
from expertmesh.rpc import forks, loop

HIDDEN = torch.ones(2, 4)


def _make(hidden: Any = HIDDEN, layer: Any = 1, ids: Any = None, weights: Any = None) -> Any:
    return make_request(hidden, layer, ids, weights, False, "refuse")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hidden": [[1.0]]}, "hidden is a list"),
        ({"hidden": HIDDEN.numpy()}, "hidden is a ndarray"),
        ({"hidden": HIDDEN.to("meta")}, "meta device"),
        ({"hidden": HIDDEN.to_sparse()}, "sparse"),
        ({"hidden": torch.tensor(1.0)}, "no dimensions"),
        ({"hidden": HIDDEN.double()}, "float64"),
        ({"layer": 3.0}, "layer is 3.0"),
        ({"layer": "3"}, "layer is '3'"),
        ({"layer": None}, "layer is None"),
        ({"layer": 1 << 40}, "expected an index"),
        ({"ids": [[1]]}, "expert_ids is a list"),
        ({"ids": torch.ones(2, 1)}, "expected int32"),
        ({"ids": torch.ones(2, 1, dtype=torch.bool)}, "torch.bool"),
        ({"ids": torch.ones(2, 1).to(torch.uint64)}, "torch.uint64"),
        ({"weights": torch.ones(2, 1, dtype=torch.int64)}, "expected float32"),
    ],
)
def test_what_cannot_be_sent_is_refused_and_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        _make(**arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32])
def test_ids_out_of_range_do_not_wrap_around_into_it(dtype: torch.dtype) -> None:
    huge = torch.tensor([[(1 << 32) - 1]]).to(dtype)

    assert _make(ids=huge).expert_ids.tolist() == [[(1 << 31) - 1]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_type_are_sent_as_int32(dtype: torch.dtype) -> None:
    request = _make(ids=torch.tensor([[3], [1]], dtype=dtype))

    assert request.expert_ids.dtype == torch.int32
    assert request.expert_ids.tolist() == [[3], [1]]


def test_leading_dimensions_become_rows_and_views_are_resolved() -> None:
    negative = torch._neg_view(torch.ones(2, 3, 4))

    sent = _make(hidden=negative, layer=torch.tensor(1))

    assert sent.layer == 1
    assert sent.hidden_states.shape == (6, 4)
    assert not sent.hidden_states.is_neg()
    assert sent.hidden_states.numpy().sum() == -24.0


@pytest.mark.parametrize("timeout", [float("nan"), "5"])
def test_a_timeout_that_is_no_time_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected seconds"):
        deadline_after(timeout)


@pytest.mark.parametrize("address", [None, 5, "", "host", "host:", ":1", "host:0", "h:70000"])
def test_an_address_that_is_none_is_refused(address: Any) -> None:
    with pytest.raises(InvalidRequestError, match="address is"):
        expertmesh.connect(address)


def test_a_forked_process_is_told_to_be_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    loop.shared_loop()
    monkeypatch.setattr(forks, "_pid", -1)

    with pytest.raises(ConfigError, match="spawn"):
        loop.shared_loop()
