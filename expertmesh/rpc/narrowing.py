"""Hidden states narrowed and widened at both ends of a call, never long on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from expertmesh.codec import narrow
from expertmesh.errors import InternalError, InvalidRequestError
from expertmesh.rpc.answering import Handler
from expertmesh.rpc.deadline import Deadline

_T = TypeVar("_T")
_INLINE_ELEMENTS = 1 << 17  # some 0.2 ms: up to this a thread hop costs more than the work


async def off_loop(size: int, function: Callable[..., _T], *arguments: Any) -> _T:
    """Runs work on that many elements: on a thread, unless it is short."""
    if size <= _INLINE_ELEMENTS:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


async def ask_narrow(
    request: Any,
    dtype: torch.dtype,
    who: str,
    ask: Callable[[Any], Awaitable[Any]],
    answer_dtype: Callable[[torch.dtype], torch.dtype] = lambda asked: asked,
) -> Any:
    """The answer to `request`, both of them narrowed to `dtype` on their way.

    The answer's hidden states come out in the type that the request's had, or in what
    `answer_dtype` makes of it. `ask` sends what it is given; `who` answers it. The request itself
    stays as it is. Raises what `ask` raises, and InternalError for an answer that cannot be.
    """
    hidden = request.hidden_states
    size = hidden.numel()
    narrowed, scale = await off_loop(size, narrow.narrowed, hidden, dtype)
    response = await ask(replace(request, hidden_states=narrowed, hidden_states_scale=scale))
    answer, scale = response.hidden_states, response.hidden_states_scale
    try:
        narrow.check(answer, scale)
    except InvalidRequestError as error:
        raise InternalError(f"{who} gave an answer that cannot be: {error.message}") from None
    wide = answer_dtype(hidden.dtype)
    response.hidden_states = await off_loop(size, narrow.widened, answer, scale, wide)
    return response


def widening(handle: Handler) -> Handler:
    """`handle` for requests in FP8 as well: it is given bfloat16, and its answer goes out in FP8.

    An answer has the type of its request, whatever else is in its batch. Raises InvalidRequestError
    for scales that do not fit.
    """

    def call(request: Any, deadline: Deadline) -> Awaitable[Any]:
        hidden, scale = request.hidden_states, request.hidden_states_scale
        is_plain = hidden.dtype != narrow.FP8 and scale is None
        return (handle if is_plain else widened)(request, deadline)

    async def widened(request: Any, deadline: Deadline) -> Any:
        hidden, scale = request.hidden_states, request.hidden_states_scale
        narrow.check(hidden, scale)
        size = hidden.numel()
        wide = await off_loop(size, narrow.widened, hidden, scale, torch.bfloat16)
        # What was lent for the answer has the size of FP8.
        wider = replace(request, hidden_states=wide, hidden_states_scale=None, room=None)
        response = await handle(wider, deadline)
        response.hidden_states, response.hidden_states_scale = await off_loop(
            size, narrow.narrowed, response.hidden_states, narrow.FP8
        )
        return response

    return call
