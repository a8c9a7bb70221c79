"""Requests narrowed for their way, and widened at its end: whoever gave one still has it."""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from expertmesh.codec import narrow
from expertmesh.codec.messages import ForwardRequest, ForwardResponse
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.narrowing import ask_narrow, widening


def test_a_request_is_the_same_after_it_was_asked_narrowed() -> None:
    hidden = torch.randn(3, 8)
    request = ForwardRequest(layer=1, hidden_states=hidden)
    sent = []

    async def ask(narrowed: ForwardRequest) -> ForwardResponse:
        sent.append(narrowed)
        return ForwardResponse(hidden_states=narrowed.hidden_states)

    answer = asyncio.run(ask_narrow(request, torch.bfloat16, "it", ask))

    assert sent[0].hidden_states.dtype == torch.bfloat16
    assert request.hidden_states is hidden
    torch.testing.assert_close(answer.hidden_states, hidden.bfloat16().float())


def test_a_request_in_fp8_is_the_same_after_it_was_handled_wider() -> None:
    values, scale = narrow.narrowed(torch.randn(3, 8), narrow.FP8)
    request = ForwardRequest(layer=1, hidden_states=values, hidden_states_scale=scale)
    given = []

    async def handle(wider: Any, deadline: Deadline) -> ForwardResponse:
        given.append(wider)
        return ForwardResponse(hidden_states=wider.hidden_states)

    answer = asyncio.run(widening(handle)(request, Deadline.after(1.0)))  # type: ignore[arg-type]

    assert (given[0].hidden_states.dtype, given[0].hidden_states_scale) == (torch.bfloat16, None)
    assert request.hidden_states is values
    assert request.hidden_states_scale is scale
    assert answer.hidden_states.dtype == narrow.FP8
